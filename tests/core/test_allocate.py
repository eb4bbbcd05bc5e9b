"""Allocations: totals kept to the entry, against hand counts and brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import allocate
from gossamer.core.allocate import erk, global_, mapping, owl, uniform
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import kept
from gossamer.core.spec import Bound, names_in, parse

ALL = [uniform, erk, global_, owl]
sparsities = st.floats(0, 0.999)


@st.composite
def named_scores(draw, low=0) -> dict[str, Tensor]:
    """A model's scores: blocks of matrices and stacks, with few distinct values."""
    found = {}
    for block in range(draw(st.integers(1, 4))):
        for part in ("q", "mlp.up")[: draw(st.integers(1, 2))]:
            shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.tuples(*[st.integers(1, 4)] * 3))
            values = draw(st.lists(st.integers(low, 9), min_size=math.prod(shape), max_size=math.prod(shape)))
            found[f"model.layers.{block}.{part}"] = torch.tensor(values, dtype=torch.float32).view(shape)
    return found


def counts(found: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: round((1 - s) * tensors[name].numel()) for name, s in found.items()}


def size(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() for x in tensors.values())


@pytest.mark.parametrize("allocation", ALL)
@settings(max_examples=50, deadline=None)
@given(tensors=named_scores(), sparsity=sparsities)
def test_the_total_is_the_one_asked_for(allocation: allocate.Allocation, tensors: dict[str, Tensor], sparsity: float) -> None:
    found = allocation(tensors, sparsity)
    assert list(found) == list(tensors)
    assert all(0 <= s < 1 for s in found.values())
    assert abs(sum(counts(found, tensors).values()) - (1 - sparsity) * size(tensors)) <= len(tensors)
    assert found == allocation(tensors, sparsity)


@pytest.mark.parametrize("allocation", ALL)
@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, True, None])
def test_sparsity_is_a_fraction(allocation: allocate.Allocation, sparsity: float) -> None:
    with pytest.raises(GossamerError, match="fraction of zeros"):
        allocation({"a": torch.ones(2, 2)}, sparsity)


@pytest.mark.parametrize("allocation", ALL)
def test_nothing_and_empty_tensors(allocation: allocate.Allocation) -> None:
    assert allocation({}, 0.5) == {}
    found = allocation({"empty": torch.ones(0, 4), "a": torch.arange(4.0)}, 0.5)
    assert found["a"] == 0.5
    assert 0 <= found["empty"] < 1


def test_what_each_needs() -> None:
    wanted = {"erk": set(), "global_": {"scores"}, "mapping": set(), "owl": {"wanda"}, "uniform": set(), "by": {"scores"}}
    wanted |= {"sap": {"weights"}, "ecoflap": {"losses"}, "searched": {"errors"}, "evolved": {"trials"}}
    assert {name: set(a.needs) for name, a in names_in(allocate).items()} == wanted
    assert all(isinstance(a.needs, frozenset) for a in names_in(allocate).values())


def test_specs_bind_the_hyper_parameters() -> None:
    names = names_in(allocate)
    assert parse("owl", names) is owl
    assert parse("owl(outlier=7.0, spread=0.1)", names) == Bound(owl, (("outlier", 7.0), ("spread", 0.1)))
    scores = {"layers.0.w": torch.ones(4, 4), "layers.1.w": torch.eye(4)}
    assert parse("owl(spread=0.0)", names)(scores, 0.5) == pytest.approx(dict.fromkeys(scores, 0.5))
    assert parse("global_(floor=0.5)", names)(scores, 0.5) == global_(scores, 0.5, floor=0.5)


@pytest.mark.parametrize("allocation", [uniform, erk])
def test_shapes_are_enough(allocation: allocate.Allocation) -> None:
    shapes = {"a": (4, 6), "b": (3, 16, 16), "c": (64, 8)}
    meta = allocation({n: torch.empty(s, device="meta") for n, s in shapes.items()}, 0.7)
    assert meta == allocation({n: torch.zeros(s) for n, s in shapes.items()}, 0.7)


def test_uniform() -> None:
    assert uniform({"a": torch.ones(3, 3), "b": torch.ones(5)}, 0.3) == {"a": 0.3, "b": 0.3}


def test_erk_by_hand() -> None:
    # raw densities (4+4)/16 = 1/2 and (8+24)/192 = 1/6; 0.25 · 208 = 52 = ε (8 + 32): ε = 1.3
    found = erk({"a": torch.empty(4, 4), "b": torch.empty(8, 24)}, 0.75)
    assert found == pytest.approx({"a": 1 - 1.3 / 2, "b": 1 - 1.3 / 6})


def test_erk_makes_small_tensors_dense_and_the_rest_pays() -> None:
    tensors = {"tiny": torch.empty(2, 2), "small": torch.empty(4, 4), "large": torch.empty(40, 40)}
    found = erk(tensors, 0.5)  # tiny and small are dense; large keeps 810 − 20 of 1600
    assert found == pytest.approx({"tiny": 0.0, "small": 0.0, "large": 1 - 790 / 1600})
    assert erk(tensors, 0.0) == pytest.approx(dict.fromkeys(tensors, 0.0))


def test_erk_reads_a_stack_as_its_matrices() -> None:
    stacked = erk({"experts": torch.empty(8, 16, 32), "q": torch.empty(64, 64)}, 0.6)
    apart = erk({**{f"e{i}": torch.empty(16, 32) for i in range(8)}, "q": torch.empty(64, 64)}, 0.6)
    assert stacked["q"] == pytest.approx(apart["q"])
    assert stacked["experts"] == pytest.approx(apart["e0"])


@settings(max_examples=60, deadline=None)
@given(named_scores(low=-4), sparsities)
def test_global_is_one_ranking_of_all(tensors: dict[str, Tensor], sparsity: float) -> None:
    entries = [(-v, t, i) for t, x in enumerate(tensors.values()) for i, v in enumerate(x.flatten().tolist())]
    total = round((1 - sparsity) * len(entries))
    ranked = sorted(entries)[:total]
    expected = [sum(t == tensor for _, t, _ in ranked) for tensor in range(len(tensors))]
    found = list(counts(global_(tensors, sparsity), tensors).values())
    if min(expected) > 0:
        assert found == expected
        assert sum(found) == total
    else:
        assert min(found) == 1
        assert sum(found) == max(total, len(found))


@settings(max_examples=60, deadline=None)
@given(named_scores(), st.floats(0, 0.9), st.floats(0, 1))
def test_global_leaves_no_tensor_below_the_floor(tensors: dict[str, Tensor], sparsity: float, share: float) -> None:
    floor = share * (1 - sparsity)
    found = counts(global_(tensors, sparsity, floor=floor), tensors)
    least = {name: max(math.ceil(floor * x.numel() - 1e-9), 1) for name, x in tensors.items()}
    assert all(found[name] >= least[name] for name in tensors)
    assert sum(found.values()) == max(kept(sparsity, size(tensors)), sum(least.values()))


def test_global_with_a_floor_by_hand() -> None:
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([5.0, 4.0, 3.0, 2.0]), "c": torch.tensor([5.5, 1.0])}
    assert counts(global_(scores, 0.4), scores) == {"a": 4, "b": 1, "c": 1}
    assert counts(global_(scores, 0.4, floor=0.5), scores) == {"a": 3, "b": 2, "c": 1}


def test_global_breaks_ties_by_order() -> None:
    scores = {name: torch.zeros(4) for name in "abc"}
    scores["b"] = torch.full((4,), -0.0)
    assert counts(global_(scores, 0.5), scores) == {"a": 4, "b": 1, "c": 1}
    assert counts(global_(scores, 1 / 12), scores) == {"a": 4, "b": 4, "c": 3}


def test_global_tells_neighbouring_floats_apart() -> None:
    one = torch.tensor(1.0)
    up = torch.nextafter(one, 2 * one)
    for sign in (1, -1):
        scores = {"a": torch.stack([one] * 4) * sign, "b": torch.stack([up] * 4) * sign}
        better = "b" if sign == 1 else "a"
        assert counts(global_(scores, 3 / 8), scores)[better] == 4
    extremes = {"a": torch.tensor([3.4e38, 1e-45, 0.0]), "b": torch.tensor([-1e-45, -3.4e38, 1.0])}
    assert counts(global_(extremes, 0.5), extremes) == {"a": 2, "b": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_global_ranks_every_dtype_as_float32(dtype: torch.dtype) -> None:
    scores = {n: torch.randn(7, 9, generator=torch.Generator().manual_seed(i)).to(dtype) for i, n in enumerate("ab")}
    assert global_(scores, 0.37) == global_({n: x.float() for n, x in scores.items()}, 0.37)


@pytest.mark.parametrize("floor", [-0.1, 0.6, math.nan])
def test_a_floor_that_cannot_be(floor: float) -> None:
    with pytest.raises(GossamerError, match="floor"):
        global_({"a": torch.ones(4)}, 0.5, floor=floor)


@pytest.mark.parametrize("allocation", [global_, owl])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_the_tensor(allocation: allocate.Allocation, bad: float) -> None:
    with pytest.raises(GossamerError, match=r"layers\.1\.w: 1 of 3 scores"):
        allocation({"layers.0.w": torch.ones(2), "layers.1.w": torch.tensor([1.0, bad, 2.0])}, 0.5)


def blocks(*outliers: int, entries: int = 100) -> dict[str, Tensor]:
    """Blocks of two tensors with so many outliers of far more than 5 times the mean, split between the two."""
    found = {}
    for i, count in enumerate(outliers):
        flat = torch.ones(entries)
        flat[:count] = 1000.0
        found[f"model.layers.{i}.a"], found[f"model.layers.{i}.b"] = flat[::4].clone(), flat.view(-1, 4)[:, 1:].clone()
    return found


def test_owl_by_hand() -> None:
    found = owl(blocks(0, 2, 4), 0.7)  # d = 0, .5, 1, their mean .5: S = .7 − .16 (d − .5)
    by_block = {f"model.layers.{i}.{part}": s for i, s in enumerate((0.78, 0.70, 0.62)) for part in "ab"}
    assert found == pytest.approx(by_block)
    wider = owl(blocks(0, 2, 4), 0.7, spread=0.2)
    assert sorted(set(wider.values())) == pytest.approx([0.5, 0.7, 0.9])


def test_owl_stays_in_the_papers_range_and_spreads_the_rest() -> None:
    found = owl(blocks(0, 0, 0, 4), 0.7)  # centred: .74, .74, .74, .58; limited to .62, the others give .04 / 3 each
    assert list(found.values())[::2] == pytest.approx([0.7 + 0.08 / 3] * 3 + [0.62])


def test_owl_counts_outliers_against_the_mean_of_the_block() -> None:
    # in its own tensor none of b's entries is 5 times the mean; in the block all of them are
    scores = {"layers.0.a": torch.ones(95), "layers.0.b": torch.full((5,), 100.0), "layers.1.a": torch.ones(100)}
    found = owl(scores, 0.5)
    assert found["layers.0.a"] == found["layers.0.b"] == pytest.approx(0.42)
    assert found["layers.1.a"] == pytest.approx(0.58)
    assert owl(scores, 0.5, outlier=100.0) == pytest.approx(dict.fromkeys(scores, 0.5))


def test_owl_weighs_blocks_by_size() -> None:
    scores = {"layers.0.w": torch.ones(300), **{k: v for k, v in blocks(0, 4).items() if "layers.1" in k}}
    scores = {name.replace("model.", ""): x for name, x in scores.items()}
    found = owl(scores, 0.5)  # centred at weighted mean .25: .54 and .38, limited to .42, so the large one takes 8/300
    assert found["layers.1.a"] == pytest.approx(0.42)
    assert found["layers.0.w"] == pytest.approx(0.5 + 0.08 / 3)


def test_owl_without_outliers_is_uniform() -> None:
    assert owl(blocks(2, 2, 2), 0.7) == dict.fromkeys(blocks(2, 2, 2), 0.7)
    assert owl(blocks(3), 0.7) == dict.fromkeys(blocks(3), 0.7)


def test_owl_takes_a_name_without_digits_as_a_block() -> None:
    scores = {"lm_head": torch.ones(100), "proj2.w": blocks(4)["model.layers.0.a"].repeat(4)}
    found = owl(scores, 0.5)
    assert found["lm_head"] > 0.5 > found["proj2.w"]


@settings(max_examples=60, deadline=None)
@given(named_scores(), sparsities, st.floats(0, 0.5), st.floats(0, 3))
def test_owl_keeps_the_mean_and_the_range(tensors: dict[str, Tensor], sparsity: float, spread: float, outlier: float) -> None:
    found = owl(tensors, sparsity, spread=spread, outlier=outlier)
    assert sum(s * tensors[n].numel() for n, s in found.items()) == pytest.approx(sparsity * size(tensors), abs=1e-9)
    assert all(max(0, sparsity - spread) - 1e-12 <= s <= sparsity + spread + 1e-12 and s < 1 for s in found.values())


@pytest.mark.parametrize("wrong", [{"outlier": -1.0}, {"spread": -0.1}, {"spread": math.nan}])
def test_owl_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(GossamerError, match="owl wants"):
        owl({"a": torch.ones(3)}, 0.5, **wrong)


TENSORS = {f"model.layers.{i}.{part}": torch.empty(4, 5) for i in range(2) for part in ("q_proj", "up_proj")}


def test_mapping_takes_names_before_patterns_and_the_first_pattern() -> None:
    given_ = {"*.q_proj": 0.25, "*": 0.5, "model.layers.1.up_proj": 0.75}
    assert mapping(given_)(TENSORS) == {
        "model.layers.0.q_proj": 0.25,
        "model.layers.0.up_proj": 0.5,
        "model.layers.1.q_proj": 0.25,
        "model.layers.1.up_proj": 0.75,
    }


def test_mapping_wants_no_other_total() -> None:
    half = mapping({"*.q_proj": 0.25, "*.up_proj": 0.75})
    assert half(TENSORS, 0.5) == half(TENSORS, None) == half(TENSORS)
    assert half(TENSORS, 0.51) == half(TENSORS), "within one entry a tensor"
    with pytest.raises(GossamerError, match=r"come to 0\.5 in total, which contradicts 0\.6"):
        half(TENSORS, 0.6)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        (
            {"*": 0.5, "model.layers.0.qproj": 0.1},
            r"'model\.layers\.0\.qproj' matches no tensor; the nearest .*layers\.0\.q_proj",
        ),
        ({"*": 0.5, "*.k_proj": 0.1}, r"'\*\.k_proj' matches no tensor"),
        ({"*.q_proj": 0.5}, r"no sparsity for 'model\.layers\.0\.up_proj'; the nearest keys are \*\.q_proj"),
        ({}, r"no sparsity for 'model\.layers\.0\.q_proj'"),
    ],
)
def test_mapping_names_what_does_not_match(given_: dict[str, float], says: str) -> None:
    with pytest.raises(GossamerError, match=says):
        mapping(given_)(TENSORS)


@pytest.mark.parametrize("value", [1.0, -0.5, math.nan, True, "0.5", None])
def test_mapping_checks_its_values(value: object) -> None:
    with pytest.raises(GossamerError, match="fraction of zeros"):
        mapping({"*": value})  # type: ignore[dict-item]
    with pytest.raises(GossamerError, match="a sparsity for each name"):
        mapping(0.5)  # type: ignore[arg-type]


def test_mapping_is_a_spec() -> None:
    given_ = mapping({"*.q_proj": 0.25, "*": 0})
    assert repr(given_) == "mapping(given={'*.q_proj': 0.25, '*': 0.0})"
    assert parse(repr(given_), names_in(allocate)) == given_
