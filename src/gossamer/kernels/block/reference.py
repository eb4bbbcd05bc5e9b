"""x Wᵀ for tiles, said plainly: any device, any dtype, gradients of x and of the values."""

from collections.abc import Sequence

import torch
from torch import Tensor


def linear(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), tile by tile."""
    _, h, w = values.shape
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    parts = torch.einsum("btw,thw->bth", x.float().unflatten(1, (-1, w))[:, columns.long()], values.float())
    y = parts.new_zeros(len(x), shape[0] // h, h).index_add(1, row, parts)
    return y.flatten(1).to(x.dtype)
