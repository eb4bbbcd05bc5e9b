"""x Wᵀ for tiles on 4-bit grids, said plainly: any device, any dtype, gradients of x and of the scales."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """Return x Wᵀ, (batch, out), tile by tile."""
    h, w = tile
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    own = entries(values, scale, zero, h * w).view(-1, h, w)
    parts = torch.einsum("btw,thw->bth", x.float().unflatten(1, (-1, w))[:, columns.long()], own)
    y = parts.new_zeros(len(x), shape[0] // h, h).index_add(1, row, parts)
    return y.flatten(1).to(x.dtype)
