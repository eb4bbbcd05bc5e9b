"""Levels: one of several for each of many things, at the least total cost within a budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

# Into how many steps the budget is divided; sizes are rounded up to them, so that the budget is kept.
STEPS = 10_000


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Choose a level l_i for each thing i: minimise Σ costs[i][l_i] with Σ sizes[i][l_i] ≤ budget, by dynamic programming.

    Args:
        costs, sizes: for each thing, of each of its levels.
        budget: what the sizes may come to together.

    Raises:
        GossamerError: even the smallest levels come to more.

    Source: Frantar and Alistarh, SPDY, 2022, arXiv:2201.13096.

    >>> cheapest([[0.0, 1.0], [0.0, 5.0]], [[4.0, 1.0], [4.0, 1.0]], budget=5.0)
    [1, 0]
    """
    least = sum(min(s) for s in sizes)
    if least > budget:
        raise GossamerError(f"the smallest levels come to {least:,.6g}, and the budget is {budget:,.6g}")
    # What all need is no choice: the steps are of what lies between that and the budget.
    unit = max(budget - least, 1e-9 * budget) / STEPS
    best = torch.zeros(STEPS + 1, dtype=torch.float64)  # the least cost so far within so many steps
    chosen: list[Tensor] = []
    widths = [[_up((s - min(own)) / unit) for s in own] for own in sizes]
    for cost, width in zip(costs, widths, strict=True):
        found = torch.full((len(cost), STEPS + 1), torch.inf, dtype=torch.float64)
        for level, (price, steps) in enumerate(zip(cost, width, strict=True)):
            if steps <= STEPS:
                found[level, steps:] = best[: STEPS + 1 - steps] + price
        best, level_of = found.min(0)
        chosen.append(level_of.to(torch.int32))
    left, levels = STEPS, []
    for level_of, width in zip(reversed(chosen), reversed(widths), strict=True):
        levels.append(int(level_of[left]))
        left -= width[levels[-1]]
    return levels[::-1]


def _up(x: float) -> int:
    """Round up, but for what is rounding itself."""
    return int(-(-(x - 1e-6) // 1))
