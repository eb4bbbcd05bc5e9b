"""SparseLLM: each of its minima against brute force, and what a round of them promises."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.mlp import MLP
from gossamer.core.pattern import NM, Pattern, Unstructured
from gossamer.core.spec import parse
from gossamer.core.stats import Stats
from gossamer.solvers import SparseGPT, SparseLLM
from gossamer.solvers.sparsellm import inner, outer, refit

ACTS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def an_mlp(act: nn.Module, gated: bool, prune: Callable[[Tensor, Stats], Tensor], *, width: int = 24) -> MLP:
    """An MLP of 12 inputs and 10 outputs with biases, and two lanes of correlated tokens."""
    lanes = tuple(normal(80, 12, seed=lane) @ normal(12, 12, seed=9) / 3 for lane in (1, 2))
    stats = Stats(12, gram=True)
    for x in lanes:
        stats.add(x)
    rows = width * (1 + gated)
    return MLP(
        first=normal(rows, 12, seed=3) / 3,
        second=normal(10, width, seed=4) / 4,
        first_bias=normal(rows, seed=5) / 5,
        second_bias=normal(10, seed=6) / 5,
        act=act,
        gated=gated,
        x=lanes,
        stats=stats,
        prune_first=prune,
        prune_second=prune,
    )


def pruned_by(method: SparseLLM | SparseGPT, pattern: Pattern, sparsity: float | None) -> Callable[[Tensor, Stats], Tensor]:
    return lambda w, stats: method(w, stats, pattern, sparsity)[0]


def answer(mlp: MLP, first: Tensor, second: Tensor) -> Tensor:
    """The MLP's output on all tokens in float64, written out plainly."""
    x = torch.cat(mlp.x).double()
    made = x @ first.double().T + mlp.first_bias.double()
    if mlp.gated:
        gate, up = made[:, : len(first) // 2], made[:, len(first) // 2 :]
        p = mlp.act(gate) * up
    else:
        p = mlp.act(made)
    return p @ second.double().T + mlp.second_bias.double()


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.3), (0.1, 5.0)])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_p_is_the_least_squares_solution(shape: tuple[int, int], beta: float, gamma: float) -> None:
    w, y, p = normal(*shape, seed=1), normal(7, shape[0], seed=2), normal(7, shape[1], seed=3)
    system = torch.cat([beta**0.5 * w, gamma**0.5 * torch.eye(shape[1])]).double()
    right = torch.cat([beta**0.5 * y, gamma**0.5 * p], dim=1).double()
    expected = torch.linalg.lstsq(system, right.T).solution.T
    assert torch.allclose(inner(w, y, p, beta, gamma).double(), expected, atol=1e-4)


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 1.0), (0.2, 3.0), (3.0, 0.2)])
@pytest.mark.parametrize("gated", [False, True])
def test_z_is_the_global_minimum_for_relu(alpha: float, gamma: float, gated: bool) -> None:
    now, made, p = normal(3, 200, seed=1).unbind()
    times = normal(200, seed=2) if gated else torch.ones(200)
    found = outer(nn.ReLU(), now, made, p, times if gated else 1.0, alpha, gamma)

    def cost(z: Tensor) -> Tensor:
        return alpha * (z - made) ** 2 + gamma * (p - times * z.clamp_min(0)) ** 2

    grid = torch.linspace(-8, 8, 16001)[:, None]  # no entry's minimum is further out, and in it is 5e-4 away at most
    assert (cost(found) <= cost(grid).min(0).values + 1e-6).all()
    assert (found < 0).any(), "both branches are seen"
    assert (found > 0).any()


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_z_falls_for_other_activations_and_comes_to_rest_at_a_minimum(name: str) -> None:
    act, (now, made, p, times) = ACTS[name], normal(4, 300, seed=1).unbind()

    def cost(z: Tensor) -> Tensor:
        return 0.7 * (z - made) ** 2 + 1.3 * (p - times * act(z)) ** 2

    found = outer(act, now, made, p, times, 0.7, 1.3)
    assert (cost(found) <= cost(now)).all()
    assert (cost(found) <= cost(made)).all()
    least = cost(torch.linspace(-8, 8, 4001)[:, None]).min(0).values
    assert ((cost(found) - least) <= 0.02 * (cost(now) - least) + 1e-4).float().mean() > 0.8, "two steps are most of the way"
    rest = found
    for _ in range(50):
        rest = outer(act, rest, made, p, times, 0.7, 1.3)
    slope = torch.autograd.functional.jacobian(lambda z: cost(z).sum(), rest)
    assert (slope.abs() < 1e-2).float().mean() > 0.95


def test_gated_z_is_the_minimum_given_s_and_s_is_then_lowered_given_z() -> None:
    method, mlp = SparseLLM(alpha=0.6, gamma=1.7), an_mlp(nn.SiLU(), True, lambda w, stats: w)
    now, made, p = normal(5, 48, seed=1), normal(5, 48, seed=2), normal(5, 24, seed=3)
    s, z = method._outer(mlp, now, made, p).chunk(2, dim=-1)
    grid = torch.linspace(-8, 8, 16001)[:, None, None]
    cost = 0.6 * (grid - made[:, 24:]) ** 2 + 1.7 * (p - nn.SiLU()(now[:, :24]) * grid) ** 2
    assert ((z - grid[:, 0, 0][cost.argmin(0)]).abs() <= 1e-3).all()
    assert torch.equal(s, outer(nn.SiLU(), now[:, :24], made[:, :24], p, z, 0.6, 1.7))


def test_the_refit_is_the_pseudo_inverse_where_tokens_tell_and_the_weight_where_they_do_not() -> None:
    w, x, t = normal(6, 8, seed=1), normal(40, 8, seed=2), normal(40, 6, seed=3)
    x[:, 5] = 0  # an input that says nothing
    stats = Stats(8, gram=True)
    stats.add(x)
    found = refit(w, t.T @ x, stats, 1e-6)
    live = [0, 1, 2, 3, 4, 6, 7]
    assert torch.allclose(found[:, live], (torch.linalg.pinv(x[:, live]) @ t).T, atol=1e-4)
    assert torch.equal(found[:, 5], w[:, 5])


def test_the_refit_is_the_damped_least_squares_solution() -> None:
    w, x, t = normal(3, 6, seed=1), normal(50, 6, seed=2), normal(50, 3, seed=3)
    stats = Stats(6, gram=True)
    stats.add(x)
    gram = (x.T @ x).double()
    damp = 0.1 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = ((t.T @ x).double() + w.double() @ damp) @ torch.linalg.inv(gram + damp)
    assert torch.allclose(refit(w, t.T @ x, stats, 0.1).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_minimum_lowers_the_objective(name: str, gated: bool) -> None:
    """All but the pruning: from pruned weights, p, then z and s, then both refits."""
    method = SparseLLM(alpha=0.5, beta=2.0, gamma=1.5, damp=1e-6)
    mlp = an_mlp(ACTS[name], gated, lambda w, stats: w)
    x = torch.cat(mlp.x)
    y = mlp.out(mlp.second, mlp.inner(mlp.made(mlp.first, x)))
    first, second = (Unstructured().select(w.abs(), 0.6) * w for w in (mlp.first, mlp.second))

    def objective(first: Tensor, second: Tensor, z: Tensor, p: Tensor) -> float:
        terms = (z - mlp.made(first, x), y - mlp.out(second, p), p - mlp.inner(z))
        return float(sum(c * t.double().square().sum() for c, t in zip((0.5, 2.0, 1.5), terms, strict=True)))

    z = mlp.made(mlp.first, x)
    p = mlp.inner(z)
    values = [objective(first, second, z, p)]
    for _ in range(4):
        p = inner(second, y - mlp.second_bias, mlp.inner(z), 2.0, 1.5)
        values.append(objective(first, second, z, p))
        z = method._outer(mlp, z, mlp.made(first, x), p)
        values.append(objective(first, second, z, p))
        first = refit(mlp.first, (z - mlp.first_bias).T @ x, mlp.stats, 1e-6)
        values.append(objective(first, second, z, p))
        stats = Stats(24, gram=True)
        stats.add(p)
        second = refit(mlp.second, (y - mlp.second_bias).T @ p, stats, 1e-6)
        values.append(objective(first, second, z, p))
    for before, after in itertools.pairwise(values):
        assert after <= before + 1e-5 * values[0]
    assert values[1] < 0.9 * values[0]
    assert values[2] < 0.95 * values[1]


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("pattern", "sparsity"), [(Unstructured(), 0.5), (NM(2, 4), None)], ids=repr)
def test_the_mlp_comes_out_nearer_than_sparsegpts(name: str, gated: bool, pattern: Pattern, sparsity: float | None) -> None:
    mlp = an_mlp(ACTS[name], gated, pruned_by(SparseGPT(), pattern, sparsity))
    found = SparseLLM(steps=8).mlp(mlp)
    plain = an_mlp(ACTS[name], gated, pruned_by(SparseGPT(), pattern, sparsity))
    start = SparseLLM(steps=0).mlp(plain)
    wanted = answer(mlp, mlp.first, mlp.second)
    errors = [float((wanted - answer(mlp, *pair)).square().sum() / wanted.square().sum()) for pair in (found, start)]
    assert mlp.notes["steps"] <= 8
    assert mlp.notes["mlp_error"] == pytest.approx(errors[0], rel=1e-4)
    assert mlp.notes["mlp_error_start"] == plain.notes["mlp_error"] == pytest.approx(errors[1], rel=1e-4)
    assert errors[0] < 0.9 * errors[1]
    for w, dense in zip(found, (mlp.first, mlp.second), strict=True):
        assert w.shape == dense.shape
        assert int((w == 0).sum()) * 2 == w.numel()


@pytest.mark.parametrize("gamma", [10.0, 1.0, 0.1, 0.01])
def test_the_start_is_kept_where_no_step_is_better(gamma: float) -> None:
    """At one in four, steps often lose: what comes out is then SparseGPT's, to the bit."""
    method = SparseLLM(gamma=gamma, steps=3)
    mlp = an_mlp(ACTS["gelu"], False, pruned_by(method, NM(1, 4), None))
    found = method.mlp(mlp)
    assert mlp.notes["mlp_error"] <= mlp.notes["mlp_error_start"]
    start = SparseLLM(steps=0).mlp(an_mlp(ACTS["gelu"], False, pruned_by(method, NM(1, 4), None)))
    same = all(torch.equal(a, b) for a, b in zip(found, start, strict=True))
    assert same == (mlp.notes["steps"] == 0)


def test_each_weight_is_pruned_with_the_hessian_of_what_comes_to_it() -> None:
    """The first layer's is always that of x; the second's is rebuilt from p, which is no MLP's output any more."""
    seen: list[tuple[Tensor, Tensor]] = []

    def prune(w: Tensor, stats: Stats) -> Tensor:
        seen.append((w, stats.symmetric_gram()))
        return SparseGPT()(w, stats, Unstructured(), 0.5)[0]

    mlp = an_mlp(nn.ReLU(), False, prune)
    SparseLLM(steps=2).mlp(mlp)
    x = torch.cat(mlp.x)
    y = answer(mlp, mlp.first, mlp.second).float() - mlp.second_bias
    assert [w.shape for w, _ in seen] == [(24, 12), (10, 24)] * 3
    assert all(torch.equal(gram, seen[0][1]) for _, gram in seen[::2])
    assert torch.equal(seen[0][0], mlp.first)
    assert torch.equal(seen[1][0], mlp.second)
    first, second = (SparseGPT()(w, _stats(gram), Unstructured(), 0.5)[0] for w, gram in seen[:2])
    dense = (x @ mlp.first.T + mlp.first_bias).clamp_min(0)
    assert torch.allclose(seen[1][1], _gram((x @ first.T + mlp.first_bias).clamp_min(0)), rtol=1e-4, atol=1e-3)
    p = torch.linalg.solve(second.T @ second + torch.eye(24), (y @ second + dense).T).T
    assert torch.allclose(seen[3][1], _gram(p), rtol=1e-3, atol=1e-2)


def _gram(x: Tensor) -> Tensor:
    return x.T @ x


def _stats(gram: Tensor) -> Stats:
    stats = Stats(len(gram), gram=True)
    stats.gram = gram
    return stats


@pytest.mark.parametrize(
    "asked",
    [{"steps": -1}, {"alpha": 0.0}, {"beta": -1.0}, {"gamma": 0.0}, {"damp": 0.0}, {"block": 0}, {"gamma": float("nan")}],
)
def test_what_cannot_be_asked_for(asked: dict[str, float]) -> None:
    with pytest.raises(GossamerError, match="SparseLLM wants"):
        SparseLLM(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["steps=2.5", "steps=-1", "alpha=1e999", "gamma=0", "block=16.5", "damp=1e999"])
def test_numbers_that_cannot_be(how: str) -> None:
    with pytest.raises(GossamerError, match="SparseLLM wants"):
        parse(f"SparseLLM({how})", {"SparseLLM": SparseLLM})
