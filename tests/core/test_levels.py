"""Levels within a budget, against every combination."""

import itertools

import pytest
import torch

from gossamer.core.errors import GossamerError
from gossamer.core.levels import within


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_within_the_budget_is_cheaper(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.rand(n, generator=generator).tolist() for n in (3, 4, 2, 5)]
    sizes = [torch.randint(1, 30, (n,), generator=generator).tolist() for n in (3, 4, 2, 5)]
    budget = sum(map(min, sizes)) + 0.4 * (sum(map(max, sizes)) - sum(map(min, sizes)))
    picked = within(costs, sizes, budget)
    every = [
        sum(c[level] for c, level in zip(costs, levels, strict=True))
        for levels in itertools.product(*(range(len(c)) for c in costs))
        if sum(s[level] for s, level in zip(sizes, levels, strict=True)) <= budget
    ]
    assert sum(s[level] for s, level in zip(sizes, picked, strict=True)) <= budget
    assert sum(c[level] for c, level in zip(costs, picked, strict=True)) == pytest.approx(min(every))


def test_the_budget_may_be_met_exactly_or_not_at_all() -> None:
    assert within([[0.0, 1.0], [0.0, 1.0]], [[7.0, 3.0], [7.0, 3.0]], 10.0) in ([0, 1], [1, 0])
    assert within([[0.0, 1.0]], [[7.0, 3.0]], 3.0) == [1]
    with pytest.raises(GossamerError, match="the smallest levels come to 6, and the budget is 5"):
        within([[0.0, 1.0], [0.0, 1.0]], [[7.0, 3.0], [7.0, 3.0]], 5.0)


def test_the_budget_is_kept_where_sizes_fall_between_its_steps() -> None:
    costs, sizes = [[0.0, 1.0]] * 3, [[1.00004, 0.0]] * 3  # 3333.5 steps each of ten thousand: three are a little too much
    assert sorted(within(costs, sizes, 3.0)) == [0, 0, 1]
