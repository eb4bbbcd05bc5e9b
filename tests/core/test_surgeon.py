"""The structured brain surgeon against brute force: every set tried, every inverse computed anew."""

import itertools

import pytest
import torch

from gossamer.core.surgeon import refit, remove


def layer(out: int, in_: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * in_, in_, generator=generator, dtype=dtype) @ torch.randn(in_, in_, generator=generator, dtype=dtype)
    return torch.randn(out, in_, generator=generator, dtype=dtype), x.T @ x + 0.1 * torch.eye(in_, dtype=dtype)


def columns(groups: list[int], width: int) -> list[int]:
    return [g * width + i for g in groups for i in range(width)]


def error(w: torch.Tensor, h: torch.Tensor, found: torch.Tensor) -> float:
    d = w - found
    return float(torch.trace(d @ h @ d.T))


@pytest.mark.parametrize(("in_", "width"), [(8, 1), (12, 2), (12, 3), (40, 1)])
def test_the_downdated_inverse_is_the_recomputed_one(in_: int, width: int) -> None:
    w, h = layer(5, in_)
    groups = in_ // width
    for count in (1, groups // 2, groups - 1):  # past a quarter, what is gone is no longer carried
        removal, _, rest = remove(w, torch.linalg.inv(h), width, count)
        kept = torch.tensor(columns(removal.kept(count, groups).tolist(), width))
        wanted = torch.zeros_like(h)
        wanted[kept[:, None], kept] = torch.linalg.inv(h[kept[:, None], kept])
        torch.testing.assert_close(rest, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_what_stays_is_the_best_there_is_and_the_errors_are_exact(width: int) -> None:
    w, h = layer(4, 12, seed=width)
    groups = 12 // width
    removal, _, _ = remove(w, torch.linalg.inv(h), width, groups - 1)
    for count in range(groups):
        _, left, _ = remove(w, torch.linalg.inv(h), width, count)
        kept = columns(removal.kept(count, groups).tolist(), width)
        factor = torch.linalg.cholesky(h)  # ‖(W − Ŵ)·L‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ): least squares by another road
        best = torch.zeros_like(w)
        best[:, kept] = torch.linalg.lstsq(factor[kept].T, (w @ factor).T).solution.T
        torch.testing.assert_close(left, best, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(refit(w, h, torch.tensor(kept)), best, rtol=1e-6, atol=1e-8)
        assert float(removal.errors[count]) == pytest.approx(error(w, h, best), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("width", [1, 2])
def test_each_step_drops_what_costs_least_of_all_that_could_go(width: int) -> None:
    w, h = layer(3, 6 * width, seed=7)
    removal, _, _ = remove(w, torch.linalg.inv(h), width, 5)
    gone: list[int] = []
    for dropped in removal.order.tolist():
        costs = {}
        for candidate in set(range(6)) - set(gone):
            kept = torch.tensor(columns(sorted(set(range(6)) - {*gone, candidate}), width))
            costs[candidate] = error(w, h, refit(w, h, kept))
        assert dropped == min(costs, key=costs.__getitem__)
        gone.append(dropped)


def test_of_two_that_do_the_same_one_goes_for_nothing() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3] = x[:, 1]
    h = x.T @ x + 1e-9 * torch.eye(4, dtype=torch.float64)
    removal, left, _ = remove(torch.ones(2, 4, dtype=torch.float64), torch.linalg.inv(h), 1, 1)
    assert int(removal.order[0]) in (1, 3)
    torch.testing.assert_close(left.sum(1), torch.full((2,), 4.0, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_in_single_precision_it_stays_close_over_many_steps() -> None:
    w, h = layer(16, 256, dtype=torch.float32)
    h += h.diagonal().mean() * 0.01 * torch.eye(256)
    removal, left, _ = remove(w, torch.linalg.inv(h), 1, 200)
    assert len(set(removal.order.tolist())) == 200
    best = refit(w.double(), h.double(), removal.kept(200, 256))
    assert error(w.double(), h.double(), left.double()) == pytest.approx(error(w.double(), h.double(), best), rel=0.02)
    assert (left[:, removal.order] == 0).all()
    assert all(b >= a for a, b in itertools.pairwise(removal.errors.tolist()))
