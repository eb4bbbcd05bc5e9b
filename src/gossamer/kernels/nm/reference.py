"""x Wᵀ for n of every m, said plainly: any device, any dtype, gradients of x and of the values."""

import torch
from torch import Tensor


def columns(positions: Tensor, n: int, m: int, kept: int) -> Tensor:
    """Return the column of each value, int64 (out, kept)."""
    bits = next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)
    each = 8 // bits
    index = torch.stack([(positions >> (j * bits)) & ((1 << bits) - 1) for j in range(each)], dim=-1).flatten(1)[:, :kept]
    return index.long() + torch.arange(kept, device=positions.device) // n * m


def linear(x: Tensor, values: Tensor, positions: Tensor, n: int, m: int) -> Tensor:
    """Return x Wᵀ, (batch, out), with the matrix made dense."""
    rows, kept = values.shape
    dense = torch.zeros(rows, kept // n * m, dtype=values.dtype, device=values.device)
    return torch.nn.functional.linear(x, dense.scatter(1, columns(positions, n, m, kept), values).to(x.dtype))
