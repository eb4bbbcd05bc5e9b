"""Patterns against a brute force that ranks (score, −index) pairs in Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Channel, Pattern, Threshold, TopK, Unstructured, kept, largest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERY = [
    Unstructured(),
    Unstructured(per="tensor"),
    Unstructured(per="row"),
    NM(2, 4),
    NM(1, 3),
    Block(2, 3),
    Block(4, 1, pool="max"),
    Channel(0),
    Channel(1, pool="l2"),
    TopK(3),
    Threshold(0.25),
]

sizes = st.integers(1, 9)
shapes = st.sampled_from([(), (1,), (3,)])
sparsities = st.floats(0, 1, exclude_max=True)


@st.composite
def score_tensors(draw, rows=sizes, columns=sizes, stacks=shapes) -> Tensor:
    """Scores of few distinct values, so that ties are the rule, in every float dtype and as stacks of matrices."""
    shape = (*draw(stacks), draw(rows), draw(columns))
    values = draw(st.lists(st.integers(-3, 3), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=draw(st.sampled_from(DTYPES))).view(shape)


def best(scores: list[float], k: int) -> list[bool]:
    """Keep the k largest, equal ones in the order of their index."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in set(order[:k]) for i in range(len(scores))]


def brute(x: Tensor, k: int) -> Tensor:
    return torch.tensor([best(row, k) for row in x.reshape(-1, x.shape[-1]).tolist()]).view(x.shape)


@settings(max_examples=60, deadline=None)
@given(score_tensors(), sparsities)
def test_unstructured_over_the_tensor_is_the_brute_force(scores: Tensor, sparsity: float) -> None:
    flat = scores.reshape(1, -1)
    mask = Unstructured().select(scores, sparsity)
    assert mask.dtype is torch.bool
    assert mask.shape == scores.shape
    assert int(mask.sum()) == round((1 - sparsity) * scores.numel())
    assert torch.equal(mask.view(1, -1), brute(flat, kept(sparsity, scores.numel())))
    assert torch.equal(mask, Unstructured(per="tensor").select(scores, sparsity))


@settings(max_examples=60, deadline=None)
@given(score_tensors(), sparsities)
def test_unstructured_by_row_is_the_brute_force(scores: Tensor, sparsity: float) -> None:
    mask = Unstructured(per="row").select(scores, sparsity)
    assert (mask.sum(-1) == round((1 - sparsity) * scores.shape[-1])).all()
    assert torch.equal(mask, brute(scores, kept(sparsity, scores.shape[-1])))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(2, 8))
def test_nm_is_the_brute_force_in_every_group(data: st.DataObject, m: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = data.draw(score_tensors(columns=st.integers(1, 3).map(lambda groups: groups * m)))
    mask = NM(n, m).select(scores)
    groups = scores.reshape(-1, m)
    assert (mask.view(-1, m).sum(-1) == n).all()
    assert torch.equal(mask.view(-1, m), brute(groups, n))


@settings(max_examples=40, deadline=None)
@given(score_tensors(columns=st.just(12)), st.integers(0, 2), st.integers(1, 3))
def test_nm_on_a_slice_of_columns_is_the_slice_of_nm(scores: Tensor, start: int, width: int) -> None:
    columns = slice(4 * start, min(4 * (start + width), 12))
    assert torch.equal(NM(2, 4).select(scores[..., columns]), NM(2, 4).select(scores)[..., columns])


@settings(max_examples=40, deadline=None)
@given(score_tensors(rows=st.just(6), columns=st.just(4)), sparsities, st.sampled_from(["mean", "max", "l2"]))
def test_block_keeps_exact_counts_of_whole_tiles(scores: Tensor, sparsity: float, pool: str) -> None:
    mask = Block(3, 2, pool=pool).select(scores, sparsity)
    tiles = mask.view(-1, 2, 3, 2, 2).transpose(2, 3).reshape(-1, 6)
    assert (tiles.all(-1) | ~tiles.any(-1)).all()
    assert int(tiles.all(-1).sum()) == round((1 - sparsity) * len(tiles))


def test_block_pools_and_keeps_by_hand() -> None:
    scores = torch.tensor([[1.0, 1.0, 4.0, 0.0], [1.0, 1.0, 0.0, 0.0], [3.0, 0.0, 0.0, -9.0], [0.0, 0.0, 0.0, 0.0]])
    # tiles of 2x2: mean 1, 1 / .75, -2.25; max 1, 4 / 3, 0; l2 1, 2 / 1.5, 4.5
    kept_by = {"mean": [[1, 1], [0, 0]], "max": [[0, 1], [1, 0]], "l2": [[0, 1], [0, 1]]}
    for pool, tiles in kept_by.items():
        wanted = torch.tensor(tiles, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(Block(2, 2, pool=pool).select(scores, 0.5), wanted), pool


def test_channel_pools_and_keeps_by_hand() -> None:
    scores = torch.tensor([[3.0, 0.0, 0.0], [1.5, 1.5, 1.5], [-4.0, 0.0, 1.0]])
    rows = {"mean": 1, "max": 0, "l2": 2}  # means 1, 1.5, -1; max 3, 1.5, 1; mean squares 3, 2.25, 17/3
    for pool, best_row in rows.items():
        mask = Channel(0, pool=pool).select(scores, 2 / 3)
        assert mask.all(1).tolist() == [row == best_row for row in range(3)]
        assert int(mask.sum()) == 3
    columns = {"mean": 2, "max": 0, "l2": 0}  # means 1/6, .5, 5/6; max 3, 1.5, 1.5; squares 27.25, 2.25, 3.25
    for pool, best_column in columns.items():
        mask = Channel(1, pool=pool).select(scores, 2 / 3)
        assert mask.all(0).tolist() == [column == best_column for column in range(3)]
        assert int(mask.sum()) == 3
        assert mask.is_contiguous()


@settings(max_examples=30, deadline=None)
@given(score_tensors(stacks=st.just(())), sparsities, st.integers(0, 1))
def test_channel_keeps_exact_counts(scores: Tensor, sparsity: float, dim: int) -> None:
    mask = Channel(dim).select(scores, sparsity)
    lines = mask if dim == 0 else mask.T
    assert (lines.all(1) | ~lines.any(1)).all()
    assert int(lines.all(1).sum()) == round((1 - sparsity) * len(lines))


@settings(max_examples=30, deadline=None)
@given(score_tensors(columns=st.integers(3, 9)), st.integers(1, 3))
def test_topk_keeps_k_of_each_row(scores: Tensor, k: int) -> None:
    mask = TopK(k).select(scores)
    assert (mask.sum(-1) == k).all()
    assert torch.equal(mask, brute(scores, k))


@settings(max_examples=30, deadline=None)
@given(score_tensors(), st.integers(-4, 4))
def test_threshold_keeps_what_is_above(scores: Tensor, tau: int) -> None:
    assert torch.equal(Threshold(tau).select(scores), scores > tau)


@pytest.mark.parametrize("k", range(8))
def test_largest_of_equal_scores_keeps_the_lowest_indices(k: int) -> None:
    assert largest(torch.zeros(2, 7), k).tolist() == [[i < k for i in range(7)]] * 2


def test_equal_scores_keep_the_lowest_index_in_every_pattern() -> None:
    ones = torch.ones(4, 8)
    assert NM(2, 4).select(ones).tolist() == [[True, True, False, False] * 2] * 4
    assert Unstructured(per="row").select(ones, 0.75).tolist() == [[True] * 2 + [False] * 6] * 4
    assert Unstructured().select(ones, 0.75).tolist() == [[True] * 8] + [[False] * 8] * 3
    assert Block(2, 4).select(ones, 0.75)[:2, :4].all()
    assert Channel(0).select(ones, 0.75).all(1).tolist() == [True, False, False, False]
    assert Channel(1).select(ones, 0.75).all(0).tolist() == [True] * 2 + [False] * 6
    assert TopK(3).select(ones).tolist() == [[True] * 3 + [False] * 5] * 4


@pytest.mark.parametrize("pattern", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_in_every_dtype(pattern: Pattern, dtype: torch.dtype) -> None:
    scores = torch.randint(-9, 9, (12, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    sparsity = None if isinstance(pattern, NM | TopK | Threshold) else 0.4
    mask = pattern.select(scores, sparsity)
    assert mask.dtype is torch.bool
    assert torch.equal(mask, pattern.select(scores.clone(), sparsity))
    assert torch.equal(mask, pattern.select(scores.T.contiguous().T, sparsity)), "strides do not matter"
    assert torch.equal(mask, pattern.select(scores.double(), sparsity)), "nor does the dtype of equal values"


@pytest.mark.parametrize("pattern", EVERY, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_the_tensor(pattern: Pattern, bad: float) -> None:
    scores = torch.ones(12, 12)
    scores[3, 4] = bad
    sparsity = None if isinstance(pattern, NM | TopK | Threshold) else 0.5
    with pytest.raises(GossamerError, match=r"layers\.3\.q_proj: 1 of 144 scores are NaN or infinite"):
        pattern.select(scores, sparsity, name="layers.3.q_proj")


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        (NM(2, 4), (3, 6)),
        (NM(2, 4), ()),
        (Block(2, 2), (3, 4)),
        (Block(2, 2), (4, 3)),
        (Block(1, 1), (4,)),
        (Channel(0), (2, 3, 4)),
        (TopK(5), (2, 4)),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_names_tensor_and_sizes(pattern: Pattern, shape: tuple[int, ...]) -> None:
    sparsity = None if isinstance(pattern, NM | TopK) else 0.5
    with pytest.raises(GossamerError) as error:
        pattern.select(torch.ones(shape), sparsity, name="up_proj")
    assert str(error.value).startswith("up_proj: ")
    assert str(shape) in str(error.value)


def test_nm_that_m_does_not_divide_says_so() -> None:
    with pytest.raises(GossamerError, match=r"w: the pattern 2:4 needs an input dimension that 4 divides; shape \(3, 6\)"):
        NM(2, 4).select(torch.ones(3, 6), name="w")


def test_nm_fixes_its_own_sparsity() -> None:
    assert NM(2, 4).resolve(None) == NM(2, 4).resolve(0.5) == 0.5
    assert NM(2, 3).resolve(1 / 3) == pytest.approx(1 / 3)
    for contradiction in (0.4, 0.0, 0.6):
        with pytest.raises(GossamerError, match="contradicts"):
            NM(2, 4).select(torch.ones(2, 4), contradiction)


@pytest.mark.parametrize("pattern", [TopK(2), Threshold(0.5)], ids=repr)
def test_a_pattern_without_a_fraction_refuses_one(pattern: Pattern) -> None:
    with pytest.raises(GossamerError, match=r"leave the sparsity 0\.5 out"):
        pattern.select(torch.ones(2, 4), 0.5)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured(per="row"), Block(1, 1), Channel(0)], ids=repr)
@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 1.5, math.nan, math.inf, True, False, "0.5"])
def test_sparsity_is_a_number_from_zero_to_less_than_one(pattern: Pattern, sparsity: object) -> None:
    with pytest.raises(GossamerError, match="fraction of zeros"):
        pattern.select(torch.ones(2, 4), sparsity)  # type: ignore[arg-type]
    with pytest.raises(GossamerError, match="needs a sparsity"):
        pattern.select(torch.ones(2, 4), None)


def test_sparsity_zero_keeps_all_and_a_high_one_may_keep_none() -> None:
    assert Unstructured().select(torch.ones(3, 3), 0).all()
    assert not Unstructured().select(torch.ones(3, 3), 0.99).any()


@pytest.mark.parametrize("pattern", EVERY, ids=repr)
@pytest.mark.parametrize("shape", [(0, 12), (12, 0)])
def test_an_empty_tensor_has_an_empty_mask(pattern: Pattern, shape: tuple[int, int]) -> None:
    if isinstance(pattern, TopK) and shape[-1] == 0:
        pytest.skip("a row without entries has no k best")
    mask = pattern.select(torch.ones(shape), None if isinstance(pattern, NM | TopK | Threshold) else 0.5)
    assert mask.shape == shape
    assert mask.dtype is torch.bool


def test_integers_rank_too() -> None:
    assert Unstructured().select(torch.tensor([[1, 3, 2]]), 1 / 3).tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: NM(4, 4),
        lambda: NM(0, 4),
        lambda: NM(2.0, 4),  # type: ignore[arg-type]
        lambda: Block(0, 4),
        lambda: Block(4, 4, pool="sum"),  # type: ignore[arg-type]
        lambda: Channel(2),  # type: ignore[arg-type]
        lambda: Channel(0, pool="l1"),  # type: ignore[arg-type]
        lambda: TopK(0),
        lambda: Threshold(math.nan),
        lambda: Unstructured(per="column"),  # type: ignore[arg-type]
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(GossamerError):
        make()
