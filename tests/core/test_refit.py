"""The refit against least squares in float64."""

import pytest
import torch
from torch import Tensor

from gossamer.core import refit as module
from gossamer.core.refit import best_refit, error, refit


def problem(rows: int, columns: int, tokens: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    w = torch.randn(rows, columns, generator=generator)
    return w, torch.rand(rows, columns, generator=generator) < density, x


@pytest.mark.parametrize("entries", [1, 1 << 8, 1 << 19])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_each_row_is_its_own_least_squares(density: float, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ENTRIES, "cpu", entries)
    w, mask, x = problem(9, 12, 60, density)
    mask[3], mask[5] = False, True  # nothing kept, everything kept
    found = refit(w, mask, x.T @ x)
    for row, keep, best in zip(w.double(), mask, found, strict=True):
        expected = torch.zeros(12, dtype=torch.float64)
        if keep.any():
            expected[keep] = torch.linalg.lstsq(x.double()[:, keep], x.double() @ row).solution
        assert torch.allclose(best.double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(found[5], w[5]), "to the bit where nothing goes"


def test_no_other_values_on_the_mask_do_better() -> None:
    w, mask, x = problem(6, 10, 50, 0.5)
    h = x.T @ x
    least = error(w, refit(w, mask, h), h)
    assert (least <= error(w, w * mask, h)).all()
    for seed in range(20):
        nudge = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)) * mask * 1e-2
        assert (least <= error(w, refit(w, mask, h) + nudge, h) * (1 + 1e-4)).all()


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_hessian_without_full_rank(tokens: int) -> None:
    w, mask, x = problem(6, 10, tokens, 0.5)
    h = x.T @ x
    found = refit(w, mask, h)
    assert found.isfinite().all()
    assert (found[~mask] == 0).all()
    assert (error(w, found, h) <= error(w, w * mask, h) * (1 + 1e-3) + 1e-3).all()


def test_the_best_of_several_masks() -> None:
    w, mask, x = problem(6, 10, 50, 0.3)
    h = x.T @ x
    found, chosen = best_refit(w, (mask, ~mask, mask), h)
    assert torch.equal(chosen, ~mask)
    assert torch.equal(found, refit(w, ~mask, h))
