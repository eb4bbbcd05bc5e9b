"""Permute: an order of the columns in which n:m keeps more of the scores."""

from itertools import combinations_with_replacement

import torch
from torch import Tensor


@torch.no_grad()
def search(scores: Tensor, n: int, m: int) -> Tensor:
    """Swap columns between groups of m for as long as that keeps more: n of every m, in every row, by the largest score.

    Greedy channel swaps (Pool and Yu, 2021, "Channel Permutations for N:M Sparsity"), many at a time: for a place p in one
    group and q in another, the gain of every swap is known at once, and those that are the best for both their groups are
    done, which disturb one another not at all. Put x in the place that a group's column leaves, and the group keeps
    T + Σ_rows max(0, x − t), T the sum of the n largest of the other m − 1 and t the n-th of them.

    Args:
        scores: importance, shape (rows, columns), finite; m divides the columns.

    Returns:
        The order, shape (columns,): under ``scores[:, order]`` n:m keeps at least as much as under ``scores``.

    >>> search(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 1, 2)  # 4 and 3 need not compete
    tensor([2, 1, 0, 3])
    """
    columns = scores.T.float().contiguous()
    groups = torch.arange(len(columns), device=scores.device).view(-1, m)
    for p, q in combinations_with_replacement(range(m), 2):  # a second round of these gains a twentieth of the first
        keeps = columns[groups].topk(n, dim=1).values.sum((1, 2))
        gain = _with(columns, groups, p, groups[:, q], n) - keeps[:, None]
        gain = gain + (_with(columns, groups, q, groups[:, p], n) - keeps[:, None]).T  # a gives its p-th, b its q-th
        gain.fill_diagonal_(0)
        swapped = gain < gain.T  # which of the two gives its p-th
        gain = torch.maximum(gain, gain.T)
        while len(pair := _pairs(gain, 1e-5 * abs(float(keeps.mean())))):
            a, b = torch.where(swapped[pair[:, :1], pair[:, 1:]], pair.flip(1), pair).unbind(1)
            groups[a, p], groups[b, q] = groups[b, q], groups[a, p]
            gain[pair.flatten()] = gain[:, pair.flatten()] = 0
    return groups.flatten()


def _pairs(gain: Tensor, least: float) -> Tensor:
    """Return the pairs of groups, (pairs, 2), that gain most by one another and more than ``least``; gain is symmetric."""
    best, partner = gain.max(1)
    a = torch.arange(len(gain), device=gain.device)
    a = a[(partner[partner] == a) & (a < partner) & (best > least)]
    return torch.stack((a, partner[a]), 1)


def _with(columns: Tensor, groups: Tensor, place: int, newcomers: Tensor, n: int) -> Tensor:
    """Return what each group keeps with each newcomer in one of its places, shape (groups, newcomers)."""
    others = columns[groups[:, [k for k in range(groups.shape[1]) if k != place]]]
    best = others.topk(n, dim=1).values
    least, x = best[:, -1], columns[newcomers]
    above = (x.sum(1) - least.sum(1)[:, None] + torch.cdist(least, x, p=1)) / 2  # Σ max(0, x − t) = (Σ x − Σ t + Σ |x − t|) / 2
    return best.sum((1, 2))[:, None] + above
