"""x Wᵀ for sliced rows, said plainly: any device, any dtype, gradients of x and of the values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels.sliced.layout import CHUNK, ROWS, STEP


def columns(steps: Tensor, bases: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sorted row, column, slice) of everything stored, each (blocks, 32, 8)."""
    device = steps.device
    place = torch.repeat_interleave(torch.arange(len(ends) - 1, device=device), ends.diff().long())  # slice of each block
    begin = ends.long()[place]
    chunk = (torch.arange(len(place), device=device) - begin) // CHUNK
    walk = steps.view(len(place), ROWS, -1).long() if len(place) else steps.view(0, ROWS, STEP).long()
    if walk.shape[-1] < STEP:
        walk = torch.cat([walk & 15, walk >> 4], dim=-1)
    before = torch.nn.functional.pad(walk.sum(-1).cumsum(0), (0, 0, 1, 0))
    before = before[:-1] - before[begin + chunk * CHUNK]
    base = bases.view(-1, ROWS).long()[begin // CHUNK + place + chunk]
    column = (base + before)[..., None] + walk.cumsum(-1)
    row = place[:, None] * ROWS + torch.arange(ROWS, device=device)
    return row[..., None].expand_as(column), column, place[:, None, None].expand_as(column)


def linear(
    x: Tensor, values: Tensor, steps: Tensor, bases: Tensor, ends: Tensor, order: Tensor, shape: Sequence[int]
) -> Tensor:
    """Return x Wᵀ, (batch, out), with the matrix made dense; padding adds zeros."""
    row, column, _ = columns(steps, bases, ends)
    flat = order.long()[row.reshape(-1)] * shape[1] + column.reshape(-1)
    dense = torch.zeros((shape[0] + 1) * shape[1], dtype=torch.float32, device=values.device)
    dense = dense.index_add(0, flat, values.float()).view(shape[0] + 1, shape[1])[:-1]
    return torch.nn.functional.linear(x, dense.to(x.dtype))
