"""Levels: one of several for each of many things, at the least total cost within bounds."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

# Into how many steps a budget is divided; sizes are rounded up to them, so that the budget is kept.
STEPS = 10_000


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], least: int, most: int) -> list[int]:
    """Choose a level l_i for each thing i: minimise Σ costs[i][l_i] with least ≤ Σ sizes[i][l_i] ≤ most, exactly.

    Dynamic programming: best[t] is the least cost of the things so far whose sizes come to t. Of equal costs the lower level is
    taken. There has to be a choice within the bounds.

    Args:
        costs, sizes: for each thing, of each of its levels; sizes are integers from 0 up.

    Source: Frantar and Alistarh, SPDY, 2022, arXiv:2201.13096.

    >>> cheapest([[0.0, 1.0, 5.0], [0.0, 2.0, 2.5]], [[0, 1, 2], [0, 1, 2]], 2, 2)
    [0, 2]
    """
    best = torch.full((most + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    chosen: list[Tensor] = []
    for cost, size in zip(costs, sizes, strict=True):
        reached, level_of = torch.full_like(best, math.inf), torch.zeros(most + 1, dtype=torch.int16)
        for level, (price, takes) in enumerate(zip(cost, size, strict=True)):
            if takes <= most:
                candidate = best[: most + 1 - takes] + price
                better = candidate < reached[takes:]
                reached[takes:] = torch.where(better, candidate, reached[takes:])
                level_of[takes:] = torch.where(better, level, level_of[takes:])
        best = reached
        chosen.append(level_of)
    at = least + int(best[least:].argmin())
    levels: list[int] = []
    for level_of, size in zip(reversed(chosen), reversed(sizes), strict=True):
        levels.append(int(level_of[at]))
        at -= size[levels[-1]]
    return levels[::-1]


def within(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Do the same for sizes of any unit and Σ sizes[i][l_i] ≤ budget, in steps of a ten-thousandth of what there is to choose.

    Raises:
        GossamerError: even the smallest levels come to more.

    >>> within([[0.0, 1.0], [0.0, 5.0]], [[4.0, 1.0], [4.0, 1.0]], budget=5.0)
    [1, 0]
    """
    least = sum(min(s) for s in sizes)
    if least > budget:
        raise GossamerError(f"the smallest levels come to {least:,.6g}, and the budget is {budget:,.6g}")
    # What all need is no choice: the steps are of what lies between that and the budget.
    unit = max(budget - least, 1e-9 * budget) / STEPS
    return cheapest(costs, [[_up((s - min(own)) / unit) for s in own] for own in sizes], 0, STEPS)


def _up(x: float) -> int:
    """Round up, but for what is rounding itself."""
    return int(-(-(x - 1e-6) // 1))
