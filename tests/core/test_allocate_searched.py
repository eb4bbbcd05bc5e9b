"""The exact search, against trying everything; the mixed n:m that it rounds to."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.allocate import in_steps, searched
from gossamer.core.errors import GossamerError
from gossamer.core.levels import cheapest

tables = st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 20), min_size=4, max_size=4)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(tables, st.floats(0, 1))
def test_the_search_is_exact(table: list[tuple[int, list[int]]], share: float) -> None:
    sizes, costs = [size for size, _ in table], [[float(c) for c in cost] for _, cost in table]
    most = 3 * sum(sizes)
    least = round(share * most)
    ways = itertools.product(range(4), repeat=len(table))
    total = {way: sum(n * k for n, k in zip(sizes, way, strict=True)) for way in ways}
    price = {way: sum(cost[k] for cost, k in zip(costs, way, strict=True)) for way in total if total[way] >= least}
    found = tuple(cheapest(costs, [[size * k for k in range(len(costs[0]))] for size in sizes], least, most))
    assert total[found] >= least
    assert price[found] == min(price.values())


@settings(max_examples=60, deadline=None)
@given(tables, st.floats(0, 0.74))
def test_searched_minimises_the_sum_of_errors_at_the_total(table: list[tuple[int, list[int]]], sparsity: float) -> None:
    rising = {f"w{i}": list(itertools.accumulate([0, *cost[1:]])) for i, (_, cost) in enumerate(table)}
    sizes = {f"w{i}": 12 * size for i, (size, _) in enumerate(table)}
    tensors = {name: torch.empty(size) for name, size in sizes.items()}
    asked: list[list[float]] = []
    found = searched(tensors, sparsity, lambda grid: (asked.append(list(grid)), rising)[1], steps=4)
    assert asked == [[0.0, 0.25, 0.5, 0.75]]
    assert sum(s * sizes[n] for n, s in found.items()) == pytest.approx(sparsity * sum(sizes.values()), abs=1e-6)
    ways = [dict(zip(sizes, way, strict=True)) for way in itertools.product(range(4), repeat=len(sizes))]
    due = sparsity * sum(sizes.values()) - 1e-6
    best = min(
        sum(rising[n][k] for n, k in way.items()) for way in ways if sum(k / 4 * sizes[n] for n, k in way.items()) >= due
    )
    price = sum(
        rising[n][int(s * 4 + 1e-6)] for n, s in found.items()
    )  # at the points below: what is given back lowers none above
    assert price <= best


def test_beyond_the_grid_all_are_pruned_alike_and_nothing_is_measured() -> None:
    tensors = {name: torch.empty(10) for name in "ab"}
    assert searched(tensors, 0.9, lambda grid: pytest.fail("measured"), steps=4) == {"a": 0.9, "b": 0.9}


def test_sizes_with_no_common_unit_come_to_the_total() -> None:
    draw = random.Random(0)
    sizes = [draw.randrange(1000, 2_000_000) for _ in range(20)]
    tensors = {f"w{i}": torch.empty(n, device="meta") for i, n in enumerate(sizes)}
    errors = {name: [(k / 20) ** 2 * draw.random() for k in range(20)] for name in tensors}
    found = searched(tensors, 0.6, lambda grid: errors)
    assert sum(s * n for s, n in zip(found.values(), sizes, strict=True)) == pytest.approx(0.6 * sum(sizes), abs=1)


@pytest.mark.parametrize("steps", [1, 0, 2.5, True])
def test_a_grid_has_two_points_at_least(steps: object) -> None:
    with pytest.raises(GossamerError, match="steps"):
        searched({"a": torch.empty(4)}, 0.5, lambda grid: {}, steps=steps)  # type: ignore[arg-type]


def test_an_error_that_is_not_finite_names_the_tensor() -> None:
    with pytest.raises(GossamerError, match="b: 1 of 2 errors"):
        searched({"a": torch.empty(4), "b": torch.empty(4)}, 0.5, lambda grid: {"a": [0, 1], "b": [0, math.nan]}, steps=2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 0.99)), min_size=1, max_size=5), st.integers(1, 3))
def test_mixed_n_of_m_has_the_average_exactly_and_is_nearest(asked: list[tuple[int, float]], n: int) -> None:
    sizes = {f"w{i}": 8 * size for i, (size, _) in enumerate(asked)}
    wanted = {f"w{i}": s for i, (_, s) in enumerate(asked)}
    found = in_steps(wanted, sizes, 1 - n / 4, 4)
    assert set(found.values()) <= {0.25, 0.5, 0.75}
    assert sum(sizes[name] * s for name, s in found.items()) == (1 - n / 4) * sum(sizes.values())

    def apart(way: dict[str, float]) -> float:
        return sum(sizes[name] * (s - wanted[name]) ** 2 for name, s in way.items())

    ways = [dict(zip(sizes, way, strict=True)) for way in itertools.product((0.25, 0.5, 0.75), repeat=len(sizes))]
    fit = [way for way in ways if sum(sizes[name] * s for name, s in way.items()) == (1 - n / 4) * sum(sizes.values())]
    assert apart(found) == pytest.approx(min(map(apart, fit)))
