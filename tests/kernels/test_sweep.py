"""The sweep over the columns by its kernels: each as the reference does it, and the reference as brute force does it."""

from itertools import product

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.spec import parse
from gossamer.core.stats import Stats
from gossamer.kernels._choice import has_triton
from gossamer.kernels.sweep import reference, sweep
from gossamer.kernels.sweep.cases import TESTED, Sweep
from gossamer.sites._job import PATTERNS

ON_GPU = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed"),
]


def made(case: Sweep, device: str = "cpu") -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(0)
    stats = Stats(case.columns, gram=True, device=device)
    mixed = torch.randn(case.columns, case.columns, generator=generator) / case.columns**0.5 + torch.eye(case.columns)
    stats.add((torch.randn(3 * case.columns, case.columns, generator=generator) @ mixed).to(device))
    return torch.randn(case.rows, case.columns, generator=generator).to(device), stats


def run(case: Sweep, device: str, kernel: str) -> tuple[Tensor, Tensor]:
    w, stats = made(case, device)
    return sweep(w, stats, parse(case.pattern, PATTERNS, "pattern"), case.sparsity, 0.01, case.block, kernel)


@pytest.mark.parametrize("kernel", [pytest.param("triton", marks=ON_GPU)])
@pytest.mark.parametrize("case", TESTED, ids=str)
def test_a_kernel_does_what_the_reference_does(case: Sweep, kernel: str) -> None:
    got, mask = run(case, "cuda", kernel)
    want, wanted = run(case, "cuda", "reference")
    assert torch.equal(mask, wanted)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("pattern", ["Unstructured", "2:4"])
def test_columns_are_updated_as_obs_says(pattern: str) -> None:
    """Each step of the sweep is the least-squares optimum given all columns before it: Ŵ = the OBS update, one at a time."""
    w, stats = made(Sweep(6, 8, pattern))
    upper, _, _ = stats.inverse_factor(0.01)
    tile, keep = w.T.clone(), torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    group = (2, 4) if pattern == "2:4" else None
    reference.columnwise(tile, keep, upper, group)
    inverse, by_hand = (upper.T @ upper).double(), w.double().clone()
    for j, row in product(range(8), range(6)):  # the inverse Hessian of columns j and later is the trailing block, eliminated
        if row == 0 and j:
            inverse = inverse - inverse[:, j - 1 : j] @ inverse[j - 1 : j] / inverse[j - 1, j - 1]
        if group and j % 4 == 0:
            trailing, scores = inverse.clone(), []
            for k in range(j, j + 4):
                scores.append(float(by_hand[row, k] ** 2 / trailing[k, k]))
                trailing = trailing - trailing[:, k : k + 1] @ trailing[k : k + 1] / trailing[k, k]
            best = sorted(range(4), key=lambda k: -scores[k])[:2]
            assert sorted(best) == keep[j : j + 4, row].nonzero().flatten().tolist()
        if not keep[j, row]:
            by_hand[row] -= by_hand[row, j] / inverse[j, j] * inverse[j] * (torch.arange(8) >= j)
    left = torch.where(keep.T, tile.T, 0.0)
    torch.testing.assert_close(left, by_hand.float() * keep.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["reference", pytest.param("triton", marks=ON_GPU)])
def test_a_saliency_that_overflows_is_refused(kernel: str) -> None:
    w, stats = made(Sweep(4, 8, "2:4"), "cpu" if kernel == "reference" else "cuda")
    w[0, 0] = 1e25
    with pytest.raises(GossamerError, match="NaN or infinite"):
        sweep(w, stats, parse("2:4", PATTERNS, "pattern"), None, 0.01, 128, kernel)


def test_a_weight_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tile: Tensor, keep: Tensor, u: Tensor, group: tuple[int, int] | None) -> Tensor:
        tile[0, 0] = torch.inf
        return torch.zeros_like(tile)

    w, stats = made(Sweep(4, 8, "Unstructured"))
    monkeypatch.setattr(reference, "columnwise", broken)
    with pytest.raises(GossamerError, match="1 of 32 weights became NaN or infinite in the sweep over the columns"):
        sweep(w, stats, parse("Unstructured", PATTERNS, "pattern"), 0.5, 0.01, 128)


@pytest.mark.parametrize(
    ("kernel", "told"), [("trito", "unknown kernel 'trito'"), ("portable", "has no kernel"), ("triton", "the kernel 'triton'")]
)
def test_a_kernel_that_cannot_run_is_refused(kernel: str, told: str) -> None:
    w, stats = made(Sweep(4, 8, "2:4"))
    with pytest.raises(GossamerError, match=told):
        sweep(w, stats, parse("2:4", PATTERNS, "pattern"), None, 0.01, 128, kernel)
