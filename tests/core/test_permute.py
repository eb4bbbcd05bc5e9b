"""The order that keeps more: against all orders, and never worse than the one there was."""

from itertools import permutations

import pytest
import torch

from gossamer.core.pattern import NM
from gossamer.core.permute import search


def kept(scores: torch.Tensor, pattern: NM) -> float:
    return float((scores * pattern.select(scores)).double().sum())


def spread(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Scores whose columns differ in size: where neighbours are alike, there is something to win."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) * torch.rand(columns, generator=generator).sort().values


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(1, 4), NM(5, 8)], ids=repr)
@pytest.mark.parametrize("shape", [(1, 16), (6, 32), (32, 64), (3, 8)])
def test_an_order_never_keeps_less(pattern: NM, shape: tuple[int, int]) -> None:
    scores = spread(*shape, seed=shape[0])
    order = search(scores, pattern.n, pattern.m)
    assert torch.equal(order.sort().values, torch.arange(shape[1]))
    assert kept(scores[:, order], pattern) >= kept(scores, pattern)
    assert torch.equal(order, search(scores, pattern.n, pattern.m))
    if shape[1] > 2 * pattern.m:
        assert kept(scores[:, order], pattern) > 1.005 * kept(scores, pattern)


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_best_of_all_orders(seed: int) -> None:
    scores, pattern = spread(2, 6, seed), NM(1, 2)
    best = max(kept(scores[:, list(order)], pattern) for order in permutations(range(6)))
    assert kept(scores[:, search(scores, 1, 2)], pattern) >= 0.95 * best


def test_equal_scores_keep_their_order() -> None:
    assert torch.equal(search(torch.ones(4, 16), 2, 4), torch.arange(16))
