"""ALPS, DSnoT, Net-Trim and oBERT: each against its defining equation, worked out plainly in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Pattern, Unstructured
from gossamer.core.refit import error, refit
from gossamer.core.solver import Solver
from gossamer.core.stats import Stats
from gossamer.scores import Magnitude, Wanda
from gossamer.solvers import ALPS, OBERT, Asymmetric, DSnoT, Mask, NetTrim, SparseGPT
from gossamer.solvers.alps import GROWTH, PERIOD
from gossamer.solvers.nettrim import least_l1
from tests.sites.families import causal, ids
from tests.test_solvers import hessian, layer, output_error

ROW = Unstructured(per="row")
PATTERNS: list[tuple[Pattern, float | None]] = [(Unstructured(), 0.7), (ROW, 0.5), (NM(2, 4), None), (NM(1, 4), None)]


def with_inputs(x: Tensor) -> Stats:
    stats = Stats(x.shape[1], gram=True, mean=True)
    stats.add(x)
    return stats


# --- ALPS


def admm(w: Tensor, h: Tensor, pattern: Pattern, sparsity: float | None, rho: float) -> Tensor:
    """The paper's iteration with explicit inverses, on the Hessian scaled to a unit diagonal; return the last support."""
    scale = h.diagonal().sqrt()
    w, h, eye = w.double() * scale, h / scale / scale[:, None], torch.eye(len(h), dtype=torch.float64)
    d = w * pattern.select(w.abs(), sparsity)
    v, before = torch.zeros_like(w), d != 0
    for step in range(1, 301):
        now = torch.linalg.solve(h + rho * eye, (w @ h - v + rho * d).T).T
        d = (now + v / rho) * pattern.select((now + v / rho).abs(), sparsity)
        v = v + rho * (now - d)
        if step % PERIOD == 0:
            changed, kept = int(((d != 0) ^ before).sum()), int((d != 0).sum())
            if not changed:
                break
            rho *= next(growth for share, growth in GROWTH if changed >= share * kept)
            before = d != 0
    return d != 0


@pytest.mark.parametrize(("pattern", "sparsity"), [*PATTERNS, (Block(2, 2), 0.5)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_alps_is_admm_and_then_least_squares(pattern: Pattern, sparsity: float | None, seed: int) -> None:
    w, stats = layer(6, 16, seed=seed)
    if isinstance(pattern, Block):
        found, mask = ALPS()(w, stats, pattern, sparsity)
        assert (mask.view(3, 2, 8, 2).float().mean((1, 3)) % 1 == 0).all(), "tiles live or die together"
        assert int(mask.sum()) == 48
        return
    h = hessian(stats, 0.01)
    expected = admm(w, h, pattern, sparsity, 0.1)
    found, mask = ALPS()(w, stats, pattern, sparsity)
    first = ALPS(steps=0)(w, stats, pattern, sparsity)[0]
    errors = [float(error(w.double(), f, h).sum()) for f in (refit(w, expected, h.float()).double(), first.double())]
    if errors[0] < errors[1]:
        assert torch.equal(mask, expected)
    assert float(error(w.double(), found.double(), h).sum()) == pytest.approx(min(errors), rel=1e-3)
    for row, keep, best in zip(w.double(), mask, found.double(), strict=True):  # the normal equations on the support
        assert torch.allclose((h @ (best - row))[keep], torch.zeros(int(keep.sum()), dtype=torch.float64), atol=2e-3)


def test_alps_comes_near_the_best_of_all_supports() -> None:
    ratios = []
    for seed in range(10):
        w, stats = layer(1, 10, seed=seed)
        h = hessian(stats, 0.01).float()
        masks = torch.zeros(math.comb(10, 4), 10, dtype=torch.bool)
        for mask, kept in zip(masks, itertools.combinations(range(10), 4), strict=True):
            mask[list(kept)] = True
        copies = w.expand(len(masks), -1)
        best = float(error(copies, refit(copies, masks, h), h).min())
        found = ALPS()(w, stats, Unstructured(), 0.6)[0]
        ratios.append(float(error(w, found, h).sum()) / best)
    assert min(ratios) >= 0.999
    assert sum(ratios) / len(ratios) < 1.4


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=repr)
def test_alps_beats_sparsegpt(pattern: Pattern, sparsity: float | None) -> None:
    w, stats = layer(64, 96)
    found, mask = ALPS()(w, stats, pattern, sparsity)
    assert output_error(w, found, stats) < 0.85 * output_error(w, SparseGPT()(w, stats, pattern, sparsity)[0], stats)
    assert 0 < stats.notes["steps"] <= 300
    assert (found[~mask] == 0).all()
    assert torch.equal(ALPS()(w, stats, pattern, sparsity)[0], found)


@pytest.mark.parametrize("method", [ALPS(), NetTrim(), NetTrim(eps=0.1)], ids=repr)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=repr)
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_never_worse_than_the_refit_of_wandas_mask(
    method: Solver, pattern: Pattern, sparsity: float | None, tokens: int
) -> None:
    w, stats = layer(8, 32, tokens, seed=tokens)
    h = stats.hessian(0.01)
    first = pattern.select(w.abs() * h.diagonal().sqrt(), sparsity)
    found, _ = method(w, stats, pattern, sparsity)
    assert found.isfinite().all()
    assert float(error(w, found, h).sum()) <= float(error(w, refit(w, first, h), h).sum()) * (1 + 1e-5)


# --- Asymmetric


def two_models(rows: int, columns: int, seed: int) -> tuple[Tensor, Stats, Tensor, Tensor]:
    """Weights, the inputs of the pruned and of the dense model, and the statistics of both."""
    w, _ = layer(rows, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    dense = x @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator))
    stats = Stats(columns, gram=True)
    stats.add(x, dense)
    return w, stats, x.double(), dense.double()


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=repr)
def test_asymmetric_alps_is_least_squares_against_the_dense_output(pattern: Pattern, sparsity: float | None) -> None:
    w, stats, x, dense = two_models(6, 16, seed=3)
    found, mask = Asymmetric(ALPS())(w, stats, pattern, sparsity)
    ridge = 0.01 * x.square().sum(0).mean()
    for row, keep, best in zip(w.double(), mask, found.double(), strict=True):
        h = x[:, keep].T @ x[:, keep] + ridge * torch.eye(int(keep.sum()), dtype=torch.float64)
        exact = torch.linalg.solve(h, x[:, keep].T @ (dense @ row) + ridge * row[keep])
        torch.testing.assert_close(best[keep], exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [ALPS(), SparseGPT(), Wanda()], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_asymmetric_comes_nearer_to_the_dense_output(method: Solver, seed: int) -> None:
    w, stats, x, dense = two_models(32, 24, seed)

    def off(solver: Solver) -> float:
        found = solver(w, stats, NM(2, 4), None)[0].double()
        return float((dense @ w.double().T - x @ found.T).square().sum())

    plain = Mask(method) if isinstance(method, Wanda) else method
    assert off(Asymmetric(method)) < off(plain)
    assert off(Asymmetric(method, share=0.5)) < off(plain)
    assert torch.equal(Asymmetric(method, share=0)(w, stats, NM(2, 4), None)[0], plain(w, stats, NM(2, 4), None)[0])


def test_asymmetric_without_cross_is_the_method_alone() -> None:
    w, stats = layer(8, 16)
    assert torch.equal(Asymmetric(SparseGPT())(w, stats, NM(2, 4), None)[0], SparseGPT()(w, stats, NM(2, 4), None)[0])


# --- Net-Trim


def test_nettrim_with_white_inputs_is_a_soft_threshold() -> None:
    w = torch.tensor([[3.0, -2.0, 0.5, 0.25]])
    # ‖u − w‖² = 1² + 1² + 0.5² + 0.25² where every weight comes one nearer to zero, or to it
    found = least_l1(w, (torch.ones(4), torch.eye(4)), 2.3125, 500)
    assert torch.allclose(found, torch.tensor([[2.0, -1.0, 0.0, 0.0]]), atol=1e-3)


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_nettrim_meets_the_conditions_of_its_optimum(share: float) -> None:
    w, stats = layer(3, 8)
    h = stats.hessian(0.1).double()
    values, vectors = torch.linalg.eigh(h / h.diagonal().mean())
    h = (vectors * values) @ vectors.T
    w = w.double()
    budget = share * float(((w @ h) * w).sum())
    found = least_l1(w, (values, vectors), budget, 1000)
    assert float(error(w, found, h).sum()) == pytest.approx(budget, rel=1e-2)
    slope = (w - found) @ h  # ∝ a subgradient of ‖U‖₁: one size where U is not zero, with its sign, and no larger elsewhere
    kept = found.abs() > 1e-6
    size = (slope * found.sign())[kept]
    assert torch.allclose(size, size.mean().expand_as(size), rtol=2e-2)
    assert (slope.abs() <= size.mean() * 1.02).all()
    assert 0 < int(kept.sum()) < 24


# --- DSnoT


def swapped(w: Tensor, x: Tensor, mask: Tensor, group: int, cycles: int, threshold: float) -> tuple[Tensor, list[float]]:
    """One row's swaps, entry by entry; return its mask and |e| along the way."""
    mean, variance, norm = x.mean(0), x.var(0, unbiased=False), x.norm(dim=0)
    mask, sizes = mask.clone(), []
    for _ in range(cycles):
        e = float((w * mean)[~mask].sum())
        sizes.append(abs(e))
        s = math.copysign(1, e)
        share = [s * float(w[j] * mean[j]) for j in range(len(w))]
        pairs = [(j, k) for j in range(len(w)) for k in range(len(w)) if j // group == k // group]
        pairs = [(j, k) for j, k in pairs if not mask[j] and mask[k] and share[j] > 0 > share[k]]
        if abs(e) <= threshold or not pairs:
            break
        come = max((j for j, _ in pairs), key=lambda j: share[j] / float(variance[j]))
        go = min((k for j, k in pairs if j == come), key=lambda k: float(w[k].abs() * norm[k]))
        if abs(abs(e) - share[come] + share[go]) >= abs(e):
            break
        mask[come], mask[go] = True, False
    return mask, sizes


@pytest.mark.parametrize("pattern", [ROW, NM(2, 4)], ids=repr)
@pytest.mark.parametrize("init", [None, Magnitude(), SparseGPT()], ids=repr)
def test_dsnot_swaps_as_the_paper_says(pattern: Pattern, init: Magnitude | SparseGPT | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=generator) + 0.5 * torch.randn(16, generator=generator)
    w, stats = torch.randn(12, 16, generator=generator), with_inputs(x)
    sparsity = 0.5 if pattern == ROW else None
    method = Mask(Wanda()) if init is None else init if isinstance(init, SparseGPT) else Mask(init)
    _, start = method(w, stats, pattern, sparsity)
    found, mask = DSnoT(init=init, threshold=0.05)(w, stats, pattern, sparsity)
    moved = 0
    for row in range(12):
        group = 16 if pattern == ROW else 4
        expected, sizes = swapped(w[row].double(), x.double(), start[row], group, 50, 0.05)
        assert torch.equal(mask[row], expected)
        assert sizes == sorted(sizes, reverse=True), "the expected error never rises"
        moved += len(sizes) - 1
    assert stats.notes["swaps"] > 0
    assert torch.equal(found, w * mask), "values stay"
    assert torch.equal(
        mask.view(12, -1, 4 if pattern != ROW else 16).sum(2), start.view(12, -1, 4 if pattern != ROW else 16).sum(2)
    )


def test_dsnot_needs_what_its_start_needs() -> None:
    assert DSnoT().needs == {"norm", "mean"}
    assert DSnoT(init=SparseGPT()).needs == {"norm", "mean", "gram"}
    assert (DSnoT().per, DSnoT(init=Magnitude()).per) == ("row", "tensor")
    w, stats = layer(4, 8)
    stats = Stats.unseen(8)
    assert torch.equal(DSnoT()(w, stats, ROW, 0.5)[1], ROW.select(w.abs(), 0.5)), "no mean, no swap"
    report = gossamer.prune(causal("llama"), "DSnoT(init=SparseGPT(damp=0.1), cycles=5)", "2:4", data=ids(2, 24))
    assert report.recipe["method"] == "DSnoT(init=SparseGPT(damp=0.1), cycles=5)"


# --- oBERT


def quadratic(rows: int, columns: int, windows: int, seed: int = 0) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    stats = Stats(columns)
    stats.grads = torch.randn(windows, rows, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), stats


def fisher(stats: Stats, row: int, damp: float) -> Tensor:
    assert stats.grads is not None
    g = stats.grads[:, row].double()
    ridge = damp * float(stats.grads.double().square().mean())
    return g.T @ g / len(g) + ridge * torch.eye(g.shape[1], dtype=torch.float64)


def constrained(w: Tensor, f: Tensor, gone: list[int]) -> Tensor:
    """The δ with the least δᵀFδ for which w + δ is zero in ``gone``: its Lagrangian's linear system, in full."""
    n, q = len(w), len(gone)
    system = torch.zeros(n + q, n + q, dtype=torch.float64)
    system[:n, :n] = f
    for i, j in enumerate(gone):
        system[n + i, j] = system[j, n + i] = 1
    right = torch.cat([torch.zeros(n, dtype=torch.float64), -w[gone]])
    return torch.linalg.solve(system, right)[:n]


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(1, 4), Block(2, 4)], ids=repr)
@pytest.mark.parametrize("windows", [3, 40])
def test_obert_is_the_surgeon_of_a_quadratic_loss(pattern: Pattern, windows: int) -> None:
    w, stats = quadratic(4, 16, windows)
    sparsity = None if isinstance(pattern, NM) else 0.5
    found, mask = OBERT(block=16, damp=0.1)(w, stats, pattern, sparsity)
    unit = pattern.w if isinstance(pattern, Block) else 1
    saliency = torch.zeros(4, 16, dtype=torch.float64)
    for row in range(4):
        f, exact = fisher(stats, row, 0.1), w[row].double()
        for start in range(0, 16, unit):
            piece = list(range(start, start + unit))
            delta = constrained(exact, f, piece)
            saliency[row, piece] = delta @ f @ delta / 2
        gone = (~mask[row]).nonzero()[:, 0].tolist()
        assert torch.allclose(found[row].double(), exact + constrained(exact, f, gone), rtol=1e-3, atol=1e-4)
    assert torch.equal(mask, pattern.select(saliency, sparsity))


def test_obert_knows_nothing_across_blocks_and_fills_up_the_last() -> None:
    w, stats = quadratic(3, 10, 6)
    assert stats.grads is not None
    ridge = float(stats.grads.square().mean())
    found, mask = OBERT(block=4, damp=0.1)(w, stats, Unstructured(), 0.4)
    for row in range(3):
        f = fisher(stats, row, 0.1) - 0.1 * ridge * torch.eye(10)
        piece = torch.arange(10) // 4
        f = f * (piece[:, None] == piece) + 0.1 * ridge * torch.eye(10)
        gone = (~mask[row]).nonzero()[:, 0].tolist()
        expected = w[row].double() + constrained(w[row].double(), f.double(), gone)
        assert torch.allclose(found[row].double(), expected, rtol=1e-3, atol=1e-4)


def test_obert_gathers_the_gradient_of_each_window() -> None:
    seen: list[Tensor] = []

    class Watch(OBERT):
        def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
            assert stats.grads is not None
            seen.append(stats.grads)
            return w, torch.ones_like(w, dtype=torch.bool)

    model, windows = causal("gpt2"), ids(3, 24)
    gossamer.prune(model, Watch(), "Unstructured", sparsity=0.5, data=windows, targets="*h.1.mlp.c_fc*")
    weight = model.transformer.h[1].mlp.c_fc.weight
    for window, found in zip(windows, seen[0], strict=True):
        loss = model.eval()(input_ids=window[None], labels=window[None]).loss
        assert torch.allclose(found, torch.autograd.grad(loss, weight)[0].T, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


# --- all of them


@pytest.mark.parametrize("solver", [ALPS(), DSnoT(), NetTrim(), OBERT()], ids=repr)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=repr)
def test_hard_statistics(solver: Solver, pattern: Pattern, sparsity: float | None) -> None:
    w, _ = layer(8, 16)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))  # fewer rows than inputs
    x[:, [0, 3]] = 0  # dead ones
    x[:, 5] = x[:, 6]  # twins
    for stats in (with_inputs(x), with_inputs(torch.zeros(4, 16)), Stats.unseen(16)):
        stats.grads = torch.zeros(3, 8, 16)
        for given in (w, w.bfloat16()):
            found, mask = solver(given, stats, pattern, sparsity)
            assert found.dtype is given.dtype
            assert found.isfinite().all()
            assert (found[~mask] == 0).all()
            assert int(mask.sum()) == round((1 - (pattern.resolve(sparsity) or 0)) * 128)
    if not isinstance(solver, DSnoT):  # nothing known of the inputs: magnitude, and values stay
        assert torch.allclose(solver(w, stats, pattern, sparsity)[0], w * pattern.select(w.abs(), sparsity), atol=1e-6)


@pytest.mark.parametrize("solver", [ALPS(), NetTrim()], ids=repr)
def test_inputs_that_are_not_finite_are_refused(solver: Solver) -> None:
    w, _ = layer(4, 8)
    with pytest.raises(ArithmeticError, match="NaN or infinities"):
        solver(w, with_inputs(torch.full((3, 8), math.inf)), NM(2, 4), None)


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (ALPS, {"damp": 0.0}),
        (ALPS, {"rho": -1.0}),
        (ALPS, {"steps": -1}),
        (DSnoT, {"init": "Wanda"}),
        (DSnoT, {"cycles": -1}),
        (DSnoT, {"threshold": math.nan}),
        (NetTrim, {"eps": 1.0}),
        (NetTrim, {"damp": math.nan}),
        (OBERT, {"block": 0}),
        (OBERT, {"damp": 0.0}),
    ],
)
def test_hyper_parameters_that_make_no_sense(cls: type[Solver], wrong: dict[str, object]) -> None:
    with pytest.raises(GossamerError, match=cls.__name__):
        cls(**wrong)


def test_obert_says_when_its_fisher_matrix_is_singular() -> None:
    stats = Stats(8)
    stats.grads = torch.ones(2, 4, 8)  # of rank one
    with pytest.raises(ArithmeticError, match="the Fisher matrix is singular to float32 with damp=1e-12; a larger one may do"):
        OBERT(damp=1e-12)(torch.ones(4, 8), stats, NM(2, 4), None)
