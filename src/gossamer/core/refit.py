"""Refit: the best values for the entries that stay, the mask as it is."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

# How many entries the systems solved together have: few, so that they stay in the cache; many where launches cost.
ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}


@torch.no_grad()
def refit(w: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Minimise tr (W − Ŵ) H (W − Ŵ)ᵀ over the Ŵ that are zero off the mask, exactly, each output row on its own.

    With K the kept and D the dropped entries of a row, Ŵ_K = W_K + H_KK⁻¹ H_KD W_D: what is solved for is how far the kept
    weights move, so that an ill-conditioned H costs digits of the move only. Rows with about as many entries kept are solved
    together, by Cholesky; where H_KK is singular to float32 its diagonal, scaled to one, is raised by 1e-6, 1e-5 ...

    Args:
        w: weights, shape (out, in), float32.
        mask: bool, True = kept, shape (out, in).
        hessian: H, symmetric, positive semidefinite, shape (in, in), float32.

    Returns:
        Ŵ, shape (out, in), float32.

    >>> twins = torch.ones(2, 2) + 1e-6 * torch.eye(2)  # two inputs that are always equal
    >>> refit(torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]]), twins).round(decimals=3)
    tensor([[0., 3.]])
    """
    scale = hessian.diagonal().clamp_min(torch.finfo(w.dtype).tiny).sqrt()
    unit = hessian / scale / scale[:, None]
    dropped = w.masked_fill(mask, 0)
    pull = (dropped * scale) @ unit  # row i, column j: H_jD W_D, what the dropped entries leave to entry j
    found = w - dropped
    counts = mask.sum(1)
    order = counts.argsort(descending=True)
    start = 0
    while start < len(order) and (most := int(counts[order[start]])):
        rows = order[start : start + max(ENTRIES.get(w.device.type, 1 << 24) // most**2, 1)]
        start += len(rows)
        # The kept columns of each row first, in their order; a row with fewer than the most is filled up with ones of its own.
        columns = mask[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        spare = torch.arange(most, device=w.device) >= counts[rows, None]
        h = unit[columns[:, :, None], columns[:, None, :]]
        if bool(spare.any()):
            h.masked_fill_(spare[:, :, None] | spare[:, None, :], 0)
            h.diagonal(dim1=1, dim2=2).masked_fill_(spare, 1.0)
        right = pull[rows[:, None], columns].masked_fill_(spare, 0)
        move = torch.cholesky_solve(right[:, :, None], _cholesky(h))[:, :, 0] / scale[columns]
        found[rows[:, None], columns] += move
    return found


def best_refit(w: Tensor, masks: Iterable[Tensor], hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the refit with the least error among those on several masks, and its mask; the first of equal ones."""
    pairs = ((refit(w, mask, hessian), mask) for mask in masks)
    return min(pairs, key=lambda pair: float(error(w, pair[0], hessian).sum()))


def error(w: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    """Return the squared error (w − ŵ) H (w − ŵ)ᵀ of each output row, shape (out,)."""
    off = w - found
    return ((off @ hessian) * off).sum(1)


def _cholesky(h: Tensor) -> Tensor:
    """Factor a batch of matrices with unit diagonals; those that are not positive definite get a larger one."""
    lower, failed = torch.linalg.cholesky_ex(h)
    more = 1e-6
    while bool(failed.any()):
        bad = failed > 0
        h[bad] += more * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        lower[bad], failed[bad] = torch.linalg.cholesky_ex(h[bad])
        more *= 10
    return cast(Tensor, lower)
