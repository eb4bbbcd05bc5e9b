"""x Wᵀ for a tiled bitmask, said plainly: any device, any dtype, gradients of x and of the values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.core.format import unpack_bits
from gossamer.kernels.tiled.layout import LANES, PIECE, SHARE, begins, places, restored


def mask(bits: Tensor) -> Tensor:
    """Return which entries are kept: bool (blocks, 32, 128), as `layout.arranged` makes it."""
    return unpack_bits(bits.view(-1, SHARE // 8), SHARE).view(-1, LANES, SHARE)


def dense(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the matrix, shape (out, in)."""
    kept = mask(bits)
    entries = 4 // values.itemsize
    first = begins(kept, entries)[::PIECE] * entries
    lanes = [
        torch.zeros(piece.shape, dtype=values.dtype, device=values.device).masked_scatter(
            piece, values[at + places(piece, entries)]
        )
        for piece, at in zip(kept.split(PIECE), first, strict=False)
    ]
    return restored(torch.cat(lanes), (shape[0], shape[1]))


def linear(x: Tensor, values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), with the matrix made dense."""
    return torch.nn.functional.linear(x, dense(values, bits, shape).to(x.dtype))
