"""Stats against float64."""

import math

import pytest
import torch
from torch import Tensor

from gossamer.core.stats import Stats


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.logspace(-2, 1, width)


def gathered(x: Tensor, *, gram: bool = True) -> Stats:
    stats = Stats(x.shape[-1], gram=gram)
    stats.add(x)
    return stats


def budget(x: Tensor) -> Tensor:
    """Σ |x_i x_j| in float64 times tokens · 2⁻²⁴: what float32 sums may be off by at worst."""
    size = x.double().reshape(-1, x.shape[-1]).abs()
    return (size.T @ size) * (len(size) * 2.0**-24)


@pytest.mark.parametrize("width", [*range(1, 10), 17, 64, 67])
def test_gram_and_norm_are_those_of_float64(width: int) -> None:
    x = rows(50, width)
    stats, exact = gathered(x), x.double().T @ x.double()
    gram = stats.symmetric_gram()
    assert gram.dtype is torch.float32
    assert gram.shape == (width, width)
    assert ((gram.double() - exact).abs() <= budget(x)).all()
    assert torch.equal(gram, gram.T)
    for found in (stats, gathered(x, gram=False)):
        assert found.tokens == 50
        assert torch.allclose(found.norm.double(), x.double().norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 7, 64])
def test_how_the_batches_are_cut_does_not_matter(gram: bool, parts: int) -> None:
    x, cut = rows(64, 11), Stats(11, gram=gram)
    for batch in x.chunk(parts):
        cut.add(batch)
    whole = gathered(x, gram=gram)
    assert cut.tokens == whole.tokens == 64
    assert torch.allclose(cut.norm, whole.norm, rtol=1e-5)
    if gram:
        assert ((cut.symmetric_gram() - whole.symmetric_gram()).abs() <= 2 * budget(x)).all()


def test_leading_dimensions_are_rows() -> None:
    x = rows(24, 5)
    assert torch.equal(gathered(x.view(2, 3, 4, 5)).symmetric_gram(), gathered(x).symmetric_gram())


def test_an_empty_batch_changes_nothing() -> None:
    for gram in (True, False):
        stats = gathered(rows(9, 6), gram=gram)
        before = stats.norm.clone()
        stats.add(torch.empty(0, 6))
        assert stats.tokens == 9
        assert torch.equal(stats.norm, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gram", [True, False])
def test_half_inputs_are_summed_in_float32(dtype: torch.dtype, gram: bool) -> None:
    x = rows(300, 7).to(dtype)
    stats = gathered(x, gram=gram)
    assert stats.norm.dtype is torch.float32
    assert torch.allclose(stats.norm.double(), x.double().norm(dim=0), rtol=1e-5)
    large = torch.full((4, 3), 300.0, dtype=dtype)  # whose squares overflow float16
    assert gathered(large, gram=gram).norm.tolist() == [600.0] * 3


@pytest.mark.parametrize("width", [1, 2, 5, 8, 33])
@pytest.mark.parametrize("damp", [1e-4, 0.01, 1.0])
def test_the_factor_is_that_of_the_inverse(width: int, damp: float) -> None:
    x = rows(200, width)
    upper, dead, used = gathered(x).inverse_factor(damp)
    assert used == damp
    assert not dead.any()
    assert torch.equal(upper, upper.triu())
    h = x.double().T @ x.double()
    h += damp * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    product = upper.double().T @ upper.double() @ h
    assert (product - torch.eye(width, dtype=torch.float64)).abs().max() < 1e-7 * float(torch.linalg.cond(h)) + 1e-5


def test_the_factor_follows_new_inputs_and_each_damping() -> None:
    stats = gathered(rows(40, 6))
    first, second = stats.inverse_factor(0.01)[0], stats.inverse_factor(0.1)[0]
    assert not torch.equal(first, second)
    assert torch.equal(stats.inverse_factor(0.01)[0], first)
    stats.add(rows(40, 6, seed=1))
    assert not torch.equal(stats.inverse_factor(0.01)[0], first)


def test_dead_inputs_are_reported_and_leave_the_others_alone() -> None:
    x = rows(60, 8)
    x[:, [2, 5]] = 0
    upper, dead, used = gathered(x).inverse_factor(0.01)
    assert dead.tolist() == [j in (2, 5) for j in range(8)]
    alive = ~dead
    assert (upper[dead][:, alive] == 0).all()
    assert (upper[alive][:, dead] == 0).all()
    assert used == 0.01
    expected = gathered(x[:, alive]).inverse_factor(0.01)[0]
    assert torch.allclose(upper[alive][:, alive], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_scale_of_the_inputs_does_not_matter(scale: float) -> None:
    x = rows(60, 8)
    x[:, 3] = 0
    upper, dead, _ = gathered(x * scale).inverse_factor(0.01)
    reference, _, _ = gathered(x).inverse_factor(0.01)
    assert torch.allclose(upper[~dead][:, ~dead] * scale, reference[~dead][:, ~dead], rtol=1e-3)


def test_all_inputs_dead() -> None:
    upper, dead, _ = gathered(torch.zeros(5, 4)).inverse_factor(0.01)
    assert dead.all()
    assert upper.isfinite().all()
    assert (upper.diagonal() > 0).all()


@pytest.mark.parametrize("damp", [1e-12, 1e-8, 1e-4, 0.01])
@pytest.mark.parametrize(("tokens", "width"), [(1, 12), (5, 64), (20, 33)])
def test_fewer_tokens_than_features_succeed_and_report_the_damping(tokens: int, width: int, damp: float) -> None:
    x = rows(tokens, width).clamp_min(0.01)
    upper, dead, used = gathered(x).inverse_factor(damp)
    assert upper.isfinite().all()
    assert (upper.diagonal() > 0).all()
    assert not dead.any()
    assert used >= damp
    h = x.double().T @ x.double()
    h += used * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    product = upper.double().T @ upper.double() @ h
    assert (product - torch.eye(width, dtype=torch.float64)).abs().max() < 1e-6 * float(torch.linalg.cond(h)) + 1e-4


def test_the_damping_is_raised_until_float32_can_factor_and_the_one_used_is_said() -> None:
    stats = gathered(torch.ones(4, 6))  # rank one: 4 + 4e-12 is 4 in float32, and the second pivot is zero
    upper, _, used = stats.inverse_factor(1e-12)
    assert 1e-6 <= used <= 1e-4
    assert upper.isfinite().all()
    assert torch.equal(upper, gathered(torch.ones(4, 6)).inverse_factor(used)[0])


def test_a_raised_damping_takes_the_place_of_the_one_before() -> None:
    stats = Stats(2, gram=True)
    stats.gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # no Gram matrix: 0.01 and 0.1 do not make it positive, 1 does
    upper, _, used = stats.inverse_factor(0.01)
    assert used == pytest.approx(1.0)
    assert torch.allclose(upper.T @ upper @ torch.tensor([[2.0, 1.5], [1.5, 2.0]]), torch.eye(2), atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_have_no_factor(bad: float) -> None:
    x = rows(20, 6)
    x[3, 2] = bad
    with pytest.raises(ArithmeticError, match="NaN or infinities"):
        gathered(x).inverse_factor(0.01)


def test_unseen_inputs_are_white() -> None:
    stats = Stats.unseen(5)
    assert stats.tokens == 0
    assert stats.norm.tolist() == [1.0] * 5
    upper, dead, _ = stats.inverse_factor(0.01)
    assert not dead.any()
    assert torch.allclose(upper, torch.eye(5) / math.sqrt(1.01))


@pytest.mark.parametrize("gram", [True, False])
def test_mean_and_variance_are_those_of_float64(gram: bool) -> None:
    x, stats = rows(40, 7) + 0.5, Stats(7, gram=gram, mean=True)
    for batch in x.chunk(3):
        stats.add(batch)
    assert torch.allclose(stats.mean.double(), x.double().mean(0), rtol=1e-5)
    assert torch.allclose(stats.variance.double(), x.double().var(0, unbiased=False), rtol=1e-4, atol=1e-5)
    white = Stats.unseen(3)
    assert (white.mean.tolist(), Stats(3).total) == ([0.0] * 3, None)


def test_the_spectrum_rebuilds_the_damped_hessian_and_follows_new_inputs() -> None:
    x = rows(30, 6)
    x[:, 2] = 0
    stats = gathered(x)
    for _ in range(2):
        exact = stats.symmetric_gram().double()
        live = exact.diagonal()[exact.diagonal() > 0].mean()
        exact += 0.1 * live * torch.eye(6)
        scale, values, vectors = (t.double() for t in stats.spectrum(0.1))
        assert torch.allclose(stats.hessian(0.1).double(), exact, rtol=1e-5)
        unit = exact / scale / scale[:, None]
        assert torch.allclose((vectors * values) @ vectors.T, unit, atol=1e-5)
        assert torch.allclose(unit.diagonal(), torch.ones(6, dtype=torch.float64), rtol=1e-5)
        assert stats.spectrum(0.1)[0] is stats.spectrum(0.1)[0], "made once"
        assert (stats.damping, stats.dead) == (0.1, 1)
        stats.add(x)


@pytest.mark.parametrize("batches", [1, 3])
def test_cross_is_that_of_float64(batches: int) -> None:
    x, dense = rows(48, 5), rows(48, 5, seed=1)
    stats = Stats(5, gram=True)
    for part, twin in zip(x.tensor_split(batches), dense.tensor_split(batches), strict=True):
        stats.add(part, twin)
    assert stats.cross is not None
    exact = (dense - x).double().T @ x.double()
    torch.testing.assert_close(stats.cross.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.gram, gathered(x).gram)
    assert gathered(x).cross is None
