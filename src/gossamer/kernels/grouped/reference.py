"""x Wᵀ for tiles on 4-bit grids, said plainly: any device, any dtype, gradients of x and of the scales."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_of

from gossamer.core.grid import untiled


def entries(values: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    """Return the tiles' entries s·(q − z), float32 (tiles, size)."""
    codes = torch.cat([values & 15, values >> 4], 1)[:, :size]
    return (codes.float() - zero.float()[:, None]) * scale.float()[:, None]


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
) -> Tensor:
    """Return x Wᵀ, (batch, out), W made dense in float32."""
    h, w = tile
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    own = entries(values, scale, zero, h * w)
    dense = own.new_zeros(shape[0] // h, shape[1] // w, h * w).index_put((row, columns.long()), own)
    return linear_of(x.float(), untiled(dense, h, w)).to(x.dtype)
