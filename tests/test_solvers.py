"""Solvers: SparseGPT against explicit inverse Hessians in float64, and what an update promises."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern, Unstructured, kept
from gossamer.core.stats import Stats
from gossamer.scores import Magnitude, Wanda
from gossamer.solvers import Mask, SparseGPT


def layer(rows: int, columns: int, tokens: int | None = None, *, seed: int = 0, decay: float = 1.0) -> tuple[Tensor, Stats]:
    """Weights and the statistics of correlated inputs X = Z A, A's spectrum falling as 1 / k."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    spectrum = torch.arange(1, columns + 1).float() ** -decay
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) * spectrum @ basis.T
    stats = Stats(columns, gram=True)
    stats.add(x)
    return torch.randn(rows, columns, generator=generator), stats


def output_error(w: Tensor, found: Tensor, stats: Stats) -> float:
    """‖W X − Ŵ X‖², from the Gram matrix."""
    off = (w - found).double()
    return float((off @ stats.symmetric_gram().double() * off).sum())


def hessian(stats: Stats, damp: float) -> Tensor:
    h = stats.symmetric_gram().double()
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def refitted(w: Tensor, found: Tensor, h: Tensor, frozen: int) -> Tensor:
    """Return w with the first columns frozen as found and the others their least-squares optimum given those."""
    best = w.clone()
    best[:, :frozen] = found[:, :frozen]
    gap = (found - w)[:, :frozen]
    best[:, frozen:] -= gap @ h[:frozen, frozen:] @ torch.linalg.inv(h[frozen:, frozen:])
    return best


def sequential(w: Tensor, h: Tensor, group: int, count: list[int], per: str) -> tuple[Tensor, Tensor]:
    """Sweep over the columns by explicit inverses; groups of columns choose their masks, ``count`` kept in each."""
    w, columns = w.double(), w.shape[1]
    found, mask = w.clone(), torch.zeros(w.shape, dtype=torch.bool)
    for start, k in zip(range(0, columns, group), count, strict=True):
        stop = min(start + group, columns)
        now = refitted(w, found, h, start)[:, start:stop]
        left = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(start, stop)])
        saliency = now**2 / left
        ranked = saliency if per == "row" else saliency.reshape(1, -1)
        chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, ranked.topk(k).indices, True)
        mask[:, start:stop] = chosen.view(saliency.shape)
        for j in range(start, stop):
            found[:, j] = refitted(w, found, h, j)[:, j] * mask[:, j]
    return found, mask


@pytest.mark.parametrize("block", [1, 2, 3, 5, 12])
@pytest.mark.parametrize(("rows", "per"), [(1, "row"), (4, "row"), (4, "tensor")])
def test_sparsegpt_is_the_exact_sequential_solution(rows: int, per: str, block: int) -> None:
    w, stats = layer(rows, 11, seed=block)
    units = rows if per == "tensor" else 1
    edges = [*range(0, 11, block), 11]
    count = [kept(0.5, units * b) - kept(0.5, units * a) for a, b in itertools.pairwise(edges)]
    found, mask = SparseGPT(damp=0.05, block=block)(w, stats, Unstructured(per=per), 0.5)  # type: ignore[arg-type]
    expected, expected_mask = sequential(w, hessian(stats, 0.05), block, count, per)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 4)])
@pytest.mark.parametrize("block", [1, 4, 6, 128])
def test_sparsegpt_chooses_a_group_once_the_sweep_has_reached_it(n: int, m: int, block: int) -> None:
    w, stats = layer(5, 12, seed=m)
    found, mask = SparseGPT(damp=0.05, block=block)(w, stats, NM(n, m), None)
    expected, expected_mask = sequential(w, hessian(stats, 0.05), m, [n] * (12 // m), "row")
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("block", [4, 16, 128])
def test_white_inputs_prune_by_magnitude_within_each_block(per: str, block: int) -> None:
    w, _ = layer(8, 64)
    stats = Stats(64, gram=True)
    stats.gram = 3.0 * torch.eye(64)
    pattern = Unstructured(per=per)  # type: ignore[arg-type]
    found, mask = SparseGPT(block=block)(w, stats, pattern, 0.5)
    expected = torch.cat([pattern.select(tile.abs(), 0.5) for tile in w.split(block, dim=1)], dim=1)
    assert torch.equal(mask, expected)
    assert torch.equal(found, w * expected), "without correlation the kept weights stay as they are"
    grouped, grouped_mask = SparseGPT(block=block)(w, stats, NM(2, 4), None)
    assert torch.equal(grouped_mask, NM(2, 4).select(w.abs()))
    assert torch.equal(grouped, w * grouped_mask)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [(Unstructured(), 0.5), (Unstructured(per="row"), 0.5), (NM(2, 4), None)], ids=repr
)
def test_the_update_halves_the_error_and_beats_magnitude_and_wanda(pattern: Pattern, sparsity: float | None) -> None:
    w, stats = layer(256, 256)
    found, mask = SparseGPT()(w, stats, pattern, sparsity)
    error = output_error(w, found, stats)
    assert error <= output_error(w, w * mask, stats) / 2
    for score in (Magnitude(), Wanda()):
        assert error < output_error(w, Mask(score)(w, stats, pattern, sparsity)[0], stats)
    moved = (found - w)[mask].abs()
    assert float((moved > 1e-3).float().mean()) > 0.9, "the kept weights moved"
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 1 / 3, 0.5, 0.7, 0.99, 0.999])
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (5, 13), (7, 33)])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_counts_are_exact(shape: tuple[int, int], sparsity: float, block: int) -> None:
    w, stats = layer(*shape)
    solver = SparseGPT(block=block)
    for per in (None, "tensor", "row"):
        found, mask = solver(w, stats, Unstructured(per=per), sparsity)  # type: ignore[arg-type]
        if per == "row":
            assert (mask.sum(1) == round((1 - sparsity) * shape[1])).all()
        else:
            assert int(mask.sum()) == round((1 - sparsity) * w.numel())
        assert (found[~mask] == 0).all()
        assert (found[mask] != 0).all()
        assert mask.dtype is torch.bool
        assert found.is_contiguous()
        assert mask.is_contiguous()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (3, 5), (4, 8), (7, 8)])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_every_group_keeps_n(n: int, m: int, block: int) -> None:
    w, stats = layer(5, 5 * m)
    found, mask = SparseGPT(block=block)(w, stats, NM(n, m), None)
    assert (mask.view(5, -1, m).sum(-1) == n).all()
    assert (found[~mask] == 0).all()
    assert torch.equal(SparseGPT(block=block)(w, stats, NM(n, m), 1 - n / m)[0], found)


def test_sparsity_zero_changes_nothing() -> None:
    w, stats = layer(6, 20)
    found, mask = SparseGPT()(w, stats, Unstructured(), 0.0)
    assert mask.all()
    assert torch.equal(found, w)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=repr)
def test_dead_inputs_lose_their_weights_first(pattern: Pattern) -> None:
    w, _ = layer(6, 16)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    dead = [0, 3, 9]
    x[:, dead] = 0
    stats = Stats(16, gram=True)
    stats.add(x)
    found, mask = SparseGPT()(w, stats, pattern, 0.5)
    assert (found[:, dead] == 0).all()
    assert not mask[:, dead].any(), "half may go, and these cost nothing"
    assert found.isfinite().all()
    everything_dead = Stats(16, gram=True)
    everything_dead.add(torch.zeros(5, 16))
    assert (SparseGPT()(w, everything_dead, pattern, 0.5)[0] == 0).all()


@pytest.mark.parametrize("pattern", [Unstructured(per="row"), NM(1, 4)], ids=repr)
@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_fewer_tokens_than_inputs(pattern: Pattern, tokens: int) -> None:
    w, stats = layer(6, 32, tokens)
    sparsity = 0.75
    found, mask = SparseGPT()(w, stats, pattern, sparsity)
    assert found.isfinite().all()
    assert (mask.sum(1) == 8).all()
    assert output_error(w, found, stats) < output_error(w, w * mask, stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_solved_in_float32(dtype: torch.dtype) -> None:
    w, stats = layer(16, 64)
    half = w.to(dtype)
    found, mask = SparseGPT()(half, stats, NM(2, 4), None)
    exact, exact_mask = SparseGPT()(half.float(), stats, NM(2, 4), None)
    assert found.dtype is dtype
    assert torch.equal(mask, exact_mask)
    assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("solver", [SparseGPT(), Mask(Wanda())], ids=repr)
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (4, 8)])
def test_deterministic_and_the_weights_given_are_left_alone(solver: SparseGPT | Mask, shape: tuple[int, int]) -> None:
    w, stats = layer(*shape)
    for given in (w, w.T.contiguous().T):
        before, gram = given.clone(), stats.symmetric_gram()
        first, second = (solver(given, stats, Unstructured(), 0.5) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert torch.equal(given, before)
        assert torch.equal(stats.symmetric_gram(), gram)


@pytest.mark.parametrize("solver", [SparseGPT(), Mask(Magnitude())], ids=repr)
def test_what_does_not_fit_is_refused(solver: SparseGPT | Mask) -> None:
    w, stats = layer(3, 8)
    with pytest.raises(GossamerError, match="contradicts"):
        solver(w, stats, NM(2, 4), 0.7)
    with pytest.raises(GossamerError, match="needs a sparsity"):
        solver(w, stats, Unstructured(), None)
    with pytest.raises(GossamerError, match=r"3 divides; shape \(3, 8\)"):
        solver(w, stats, NM(2, 3), None)
    with pytest.raises(GossamerError, match="fraction of zeros"):
        solver(w, stats, Unstructured(), 1.0)
    w[1, 2] = math.nan
    with pytest.raises(GossamerError, match="NaN or infinite"):
        solver(w, stats, Unstructured(), 0.5)


@pytest.mark.parametrize("wrong", [{"damp": 0.0}, {"damp": -1.0}, {"damp": math.nan}, {"block": 0}])
def test_hyper_parameters_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(GossamerError, match="SparseGPT wants"):
        SparseGPT(**wrong)  # type: ignore[arg-type]


def test_mask_is_the_score_and_the_pattern() -> None:
    w, stats = layer(4, 8)
    found, mask = Mask(Wanda())(w.bfloat16(), stats, NM(2, 4), None)
    assert torch.equal(mask, NM(2, 4).select(w.bfloat16().float().abs() * stats.norm))
    assert torch.equal(found, w.bfloat16() * mask)
    assert found.dtype is torch.bfloat16
    assert (Mask(Wanda()).needs, Mask(Wanda()).per) == (Wanda.needs, "row")
    assert (Mask(Magnitude()).needs, Mask(Magnitude()).per) == (frozenset(), "tensor")
