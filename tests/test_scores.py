"""Each score's formula, worked by hand or entry by entry from the paper's definition."""

import math

import pytest
import torch
from torch import Tensor

from gossamer import scores
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Unstructured
from gossamer.core.score import Score
from gossamer.core.spec import names_in
from gossamer.core.stats import INPUTS, Stats
from gossamer.scores import RIA, Fisher, Gradient, GraSP, Magnitude, NoWagP, Random, Sampled, SynFlow, Wanda

W = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 0.5, 4.0]])
X = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -2.0], [0.0, 0.0, 2.0]])  # norms 5, 0, 3
G = torch.tensor([[0.5, 1.0, 9.0], [-2.0, 0.0, 0.25]])


def stats_of(x: Tensor = X, grad: Tensor | None = G, **kwargs: bool) -> Stats:
    stats = Stats(x.shape[-1], **kwargs)
    stats.add(x)
    stats.grad = grad
    stats.grads = None if grad is None else torch.stack([grad, 3 * grad])
    stats.square_grad = None if grad is None else 5 * grad.square()
    stats.hessian_grad = stats.synflow = None if grad is None else grad.abs()
    return stats


def made(name: str) -> Score:
    """An instance with its defaults; a score that wraps another wraps the plainest."""
    return Sampled(Magnitude()) if name == "Sampled" else names_in(scores)[name]()


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (Magnitude(), [[1.0, 2.0, 0.0], [3.0, 0.5, 4.0]]),
        (Wanda(), [[5.0, 0.0, 0.0], [15.0, 0.0, 12.0]]),
        # columns √10, √4.25, 4; rows then √(0.1 + 4 / 4.25), √(0.9 + 0.25 / 4.25 + 1)
        (
            NoWagP(),
            [[25 * 0.1 / (0.1 + 4 / 4.25), 0.0, 0.0], [25 * 0.9 / (1.9 + 0.25 / 4.25), 0.0, 9 / (1.9 + 0.25 / 4.25)]],
        ),
        (Fisher(), [[0.625, 10.0, 0.0], [90.0, 0.0, 2.5]]),  # of windows whose gradients are G and 3 G: ½ · 5 · (W G)²
        (Gradient(), [[0.5, 2.0, 0.0], [6.0, 0.0, 1.0]]),
        (GraSP(), [[0.5, -2.0, 0.0], [-6.0, 0.0, 1.0]]),  # Hg here is |G|: a negative score is a weight better gone
        (SynFlow(), [[0.5, 2.0, 0.0], [6.0, 0.0, 1.0]]),
        # columns sum to 4, 2.5, 4 and rows to 3, 7.5
        (RIA(power=1.0), [[5 * (1 / 4 + 1 / 3), 0.0, 0.0], [5 * (3 / 4 + 3 / 7.5), 0.0, 3 * (1 + 4 / 7.5)]]),
        (RIA(), [[5**0.5 * (1 / 4 + 1 / 3), 0.0, 0.0], [5**0.5 * (3 / 4 + 3 / 7.5), 0.0, 3**0.5 * (1 + 4 / 7.5)]]),
        (RIA(power=0.0), [[1 / 4 + 1 / 3, 0.8 + 2 / 3, 0.0], [3 / 4 + 3 / 7.5, 0.2 + 0.5 / 7.5, 1 + 4 / 7.5]]),
    ],
    ids=str,
)
def test_by_hand(score: Score, expected: list[list[float]], gram: bool) -> None:
    assert torch.allclose(score(W, stats_of(gram=gram)), torch.tensor(expected), rtol=1e-6)


def test_random_follows_its_seed_and_the_shape_alone() -> None:
    first = Random(3)(W, stats_of())
    assert torch.equal(first, Random(3)(W.bfloat16() * 2, Stats(3)))
    assert not torch.equal(first, Random(4)(W, stats_of()))
    state = torch.random.get_rng_state()
    Random(3)(W, stats_of())
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    many = Random()(torch.empty(200, 200), Stats(200))
    assert 0 <= float(many.min()) <= float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(many.var()) == pytest.approx(1 / 12, abs=0.003)


@pytest.mark.parametrize("name", scores.__all__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_score_is_float32_finite_and_leaves_its_inputs_alone(name: str, dtype: torch.dtype) -> None:
    score = made(name)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 7, generator=generator).to(dtype)
    w[2], w[:, 3] = 0, 0
    stats = stats_of(torch.randn(9, 7, generator=generator), torch.randn(5, 7, generator=generator))
    before = w.clone()
    found = score(w, stats)
    assert found.dtype is torch.float32
    assert found.shape == w.shape
    assert found.isfinite().all()
    assert name == "GraSP" or (found >= 0).all()
    assert torch.equal(found, score(w, stats))
    assert torch.equal(w, before)


@pytest.mark.parametrize("name", scores.__all__)
def test_every_score_reads_no_more_than_it_needs(name: str) -> None:
    score = made(name)
    assert score.needs <= {*INPUTS, "grad", "square_grad", "grads", "hessian_grad", "synflow"}
    stats = stats_of()
    if "norm" not in score.needs:
        stats.square_sum = torch.full((3,), math.nan)
    for need in {"grad", "square_grad", "hessian_grad", "synflow"} - score.needs:
        setattr(stats, need, None)
    assert score(W, stats).isfinite().all()


def test_unseen_inputs_rank_by_magnitude() -> None:
    assert torch.equal(Wanda()(W, Stats.unseen(3)), Magnitude()(W, Stats.unseen(3)))


def test_what_a_score_compares_with_by_default() -> None:
    assert [name for name in scores.__all__ if made(name).per == "row"] == ["Wanda"]
    assert Sampled(Wanda()).per == "row"


def test_sampled_draws_in_proportion_without_replacement() -> None:
    # Two of 3, 2, 1 are drawn: {3, 2} with 3/6·2/3 + 2/6·3/4, {3, 1} with 3/6·1/3 + 1/6·3/5, {2, 1} with 2/6·1/4 + 1/6·2/5.
    draws = 40_000
    w = torch.tensor([[3.0, -2.0, 1.0]]).repeat(draws, 1)
    mask = Unstructured(per="row").select(Sampled(Magnitude(), seed=1)(w, Stats(3)), 1 / 3)
    assert (mask.sum(1) == 2).all()
    share = {pair: float((mask[:, list(pair)].all(1)).float().mean()) for pair in ((0, 1), (0, 2), (1, 2))}
    expected = {(0, 1): 1 / 3 + 1 / 4, (0, 2): 1 / 6 + 1 / 10, (1, 2): 1 / 12 + 1 / 15}
    assert share == pytest.approx(expected, abs=0.01)


def test_sampled_keeps_no_zero_before_an_entry_that_is_none_and_follows_its_seed() -> None:
    w = torch.tensor([[0.0, 1e-20, 0.0, 5.0]])
    assert Unstructured().select(Sampled(Magnitude())(w, Stats(4)), 0.5).tolist() == [[False, True, False, True]]
    many = torch.ones(50, 50)
    first = Sampled(Magnitude(), seed=3)(many, Stats(50))
    assert torch.equal(first, Sampled(Magnitude(), seed=3)(many, Stats(50)))
    assert not torch.equal(first, Sampled(Magnitude(), seed=4)(many, Stats(50)))


def test_sampled_refuses_a_score_with_negative_values() -> None:
    with pytest.raises(GossamerError, match="GraSP has negative values"):
        Sampled(GraSP())(W, stats_of())


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True])
def test_synflow_wants_a_whole_number_of_rounds(rounds: object) -> None:
    with pytest.raises(GossamerError, match="rounds"):
        SynFlow(rounds=rounds)  # type: ignore[arg-type]
