"""x Wᵀ for a bitmask, said plainly: any device, any dtype, gradients of x and of the values."""

import torch
from torch import Tensor

from gossamer.core.format import unpack_bits


def dense(values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """Return the matrix, shape (out, in)."""
    mask = unpack_bits(bits, columns)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def linear(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return x Wᵀ, (batch, out), with the matrix made dense."""
    return torch.nn.functional.linear(x, dense(values, bits, columns).to(x.dtype))
