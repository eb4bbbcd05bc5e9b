"""The evolution of sparsities, against every choice there is, on a model whose answers are compared in another way."""

import copy
import itertools
import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import gossamer
from gossamer.core.allocate import evolved
from gossamer.core.errors import GossamerError
from gossamer.core.evolution import evolve
from gossamer.core.variants import Variants
from gossamer.sites._job import Job
from gossamer.sites._trials import Trials
from gossamer.sites._walk import targets
from tests.sites.families import causal, ids

ALL = "tokens=(64,), survivors=(1,)"  # the windows of ids() have 64 tokens
DOWN = "*.down_proj"


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits.double().flatten(0, 1).log_softmax(-1)


@pytest.mark.parametrize("method", ["Magnitude", "Wanda", "SparseGPT"])
def test_it_finds_the_best_of_all_choices(method: str) -> None:
    dense = causal("llama", num_hidden_layers=3)
    dense.model.layers[1].mlp.down_proj.weight.data *= 0.1  # this one can spare more
    then = said(dense)
    apart = {}
    for steps in itertools.product((-1, 0, 1), repeat=3):
        if sum(steps) == 0:
            given = {f"model.layers.{i}.mlp.down_proj.weight": 0.5 + 0.2 * k for i, k in enumerate(steps)}
            model = copy.deepcopy(dense)
            for target in targets(dense, DOWN):  # each pruned on the dense model, as the search does it
                one = copy.deepcopy(dense)
                s = given[target.name]
                gossamer.prune(one, method, "Unstructured", sparsity=s, data=ids(), targets=target.name.removesuffix(".weight"))
                model.get_parameter(target.name).data.copy_(one.get_parameter(target.name))
            apart[steps] = float(kl_div(said(model), then, log_target=True, reduction="batchmean"))
    assert len(apart) == 7
    best = min(apart, key=apart.__getitem__)
    model = copy.deepcopy(dense)
    how = f"evolved(levels=1, interval=0.2, generations=8, {ALL})"
    report = gossamer.prune(model, method, "Unstructured", sparsity=0.5, allocate=how, data=ids(), targets=DOWN)
    found = tuple(round((1 - row["nnz"] / 2048 - 0.5) / 0.2) for row in report.weights)
    assert found == best
    assert best != (0, 0, 0), "or this says nothing"


def test_the_total_is_kept_and_only_weights_of_one_size_trade() -> None:
    model = causal("llama")
    how = f"evolved(interval=0.1, generations=3, offspring=4, {ALL})"
    report = gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.6, allocate=how, data=ids())
    sizes: dict[int, list[float]] = {}
    for row in report.weights:
        entries = row["shape"][0] * row["shape"][1]
        sizes.setdefault(entries, []).append(1 - row["nnz"] / entries)
    assert all(sum(found) / len(found) == pytest.approx(0.6, abs=1e-3) for found in sizes.values())
    assert len({round(s, 3) for found in sizes.values() for s in found}) > 1


def test_the_weights_are_put_back_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal("llama")
    before = copy.deepcopy(model.state_dict())
    measured: list[int] = []

    def failing(self: Any, draw: int, tokens: int) -> float:
        measured.append(draw)
        return float("nan")

    monkeypatch.setattr("gossamer.sites._divergence.Moved.__call__", failing)
    with pytest.raises(GossamerError, match="allocate=evolved: the divergence of every model that was tried is NaN"):
        gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.6, allocate="evolved", data=ids())
    assert measured
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_uniform_is_the_first_parent_and_nothing_worse_is_taken() -> None:
    """On all tokens in each generation, so that more of them never make it worse."""
    then = said(causal("llama"))
    told = []
    for how in ("uniform", *(f"evolved(generations={n}, offspring=4, {ALL})" for n in (1, 4))):
        model = causal("llama")
        gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.6, allocate=how, data=ids())
        told.append(float(kl_div(said(model), then, log_target=True, reduction="batchmean")))
    assert told[0] >= told[1] - 1e-6 >= told[2] - 2e-6
    assert told[2] < told[0]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3"])
def test_families(family: str) -> None:
    how = f"evolved(levels=1, generations=1, offspring=2, {ALL})"
    report = gossamer.prune(causal(family), "Wanda", "Unstructured", sparsity=0.5, allocate=how, data=ids())
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.01)  # rows round their counts


def test_a_mixed_pattern_of_n_in_m() -> None:
    how = f"evolved(interval=0.25, levels=1, generations=3, offspring=4, {ALL})"
    report = gossamer.prune(causal("llama"), "SparseGPT", "2:4", allocate=how, data=ids())
    assert report.totals["sparsity"] == 0.5


@pytest.mark.parametrize("failing", ["get", "put"])
def test_the_weights_are_put_back_when_copying_fails(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal("llama")
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []
    real = getattr(Variants, failing)

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Variants, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.6, allocate="evolved", data=ids())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_they_are_put_back_to_the_bit_in_any_dtype(dtype: torch.dtype) -> None:
    model = causal("llama", dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    job = Job.of("Magnitude", "Unstructured", 0.5, "evolved")
    with Trials(model, job, targets(model), [{"input_ids": ids()}], None, False)([0.4, 0.6]) as trial:
        trial.take([0, 1] * 7)
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("pattern", "n"), [("1:4", {1, 2}), ("3:4", {2, 3}), ("4:8", {3, 4, 5})])
def test_only_what_an_n_in_m_pattern_can_take_is_tried(pattern: str, n: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[list[float]] = []
    trials = "gossamer.sites._trials.Trials.__call__"
    monkeypatch.setattr(trials, lambda self, grid: grids.append(list(grid)) or nullcontext(SimpleNamespace(take=None)))
    monkeypatch.setattr("gossamer.core.allocate._evolved.evolve", lambda parent, *_, **__: (parent, 0.0))
    m = int(pattern.split(":")[1])
    how = f"evolved(interval={1 / m}, levels=1)"
    if len(n) == 3:
        gossamer.prune(causal("llama"), "Magnitude", pattern, allocate=how, data=ids())
        assert grids == [[1 - k / m for k in sorted(n, reverse=True)]]
    else:  # there is one side only, and nothing to trade
        with pytest.raises(GossamerError, match="on both sides of"):
            gossamer.prune(causal("llama"), "Magnitude", pattern, allocate=how, data=ids())


def test_the_interval_is_halved_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[list[float]] = []
    trials = "gossamer.sites._trials.Trials.__call__"
    monkeypatch.setattr(trials, lambda self, grid: grids.append(list(grid)) or nullcontext(SimpleNamespace(take=None)))
    monkeypatch.setattr("gossamer.core.allocate._evolved.evolve", lambda parent, *_, **__: (parent, 0.0))
    gossamer.prune(
        causal("llama"), "Magnitude", "Unstructured", sparsity=0.9, allocate="evolved(interval=0.4, levels=1)", data=ids()
    )
    assert grids[0] == pytest.approx([0.85, 0.9, 0.95])


class Never:
    def allows(self, sparsity: float) -> bool:
        return 0 <= sparsity < 1

    def __call__(self, grid: Any) -> Any:
        raise AssertionError("a trial was made")


def test_where_there_is_nothing_to_trade_no_trial_is_made() -> None:
    assert evolved({"a": torch.ones(4), "b": torch.ones(6)}, 0.5, Never()) == {"a": 0.5, "b": 0.5}
    assert evolved({"a": torch.ones(4), "b": torch.ones(4)}, 0.0, Never()) == {"a": 0.0, "b": 0.0}


def test_a_stage_thins_out_by_its_own_tokens() -> None:
    """The one that looks best on few tokens is not taken if more of them say otherwise."""
    asked: list[tuple[int, int, int]] = []
    here = [0]

    def measure(draw: int, tokens: int) -> float:
        asked.append((draw, tokens, here[0]))
        return float(abs(here[0] - (2 if tokens == 8 else 5)))

    children = iter(range(1, 100))
    found, apart = evolve(
        [0],
        lambda parent: [next(children)],
        lambda levels: here.__setitem__(0, levels[0]),
        measure,
        random.Random(0),
        generations=1,
        offspring=6,
        survivors=(4, 1),
        tokens=(8, 64),
    )
    assert (found, apart) == ([4], 1.0)  # 1 to 4 are nearest to 2, and of those and the parent 4 is nearest to 5
    assert len({draw for draw, tokens, _ in asked if tokens == 8}) == 1, "all on the same tokens"
    assert sorted(level for _, tokens, level in asked if tokens == 64) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("evolved(interval=0)", "an interval in"),
        ("evolved(interval='a')", "an interval in"),
        ("evolved(levels=0)", "counts are 1 or more"),
        ("evolved(levels=1.5)", "counts are integers"),
        ("evolved(survivors=1, tokens=64)", "survivors and tokens several of them"),
        ("evolved(survivors=(4, 2))", "survivors as many as tokens, the last of them 1"),
        ("evolved(tokens=(5,))", "survivors as many as tokens, the last of them 1"),
    ],
)
def test_a_mistake_is_one_line(how: str, told: str) -> None:
    with pytest.raises(GossamerError, match=told):
        gossamer.prune(causal("llama"), "Magnitude", "Unstructured", sparsity=0.6, allocate=how, data=ids())


@pytest.mark.parametrize(("pattern", "told"), [("2:4", "both sides of 0.5"), ("NM(2, 4, permute=True)", "leave permute out")])
def test_patterns_that_its_levels_do_not_fit(pattern: str, told: str) -> None:
    with pytest.raises(GossamerError, match=told):
        gossamer.prune(causal("llama"), "Magnitude", pattern, allocate="evolved", data=ids())


def test_mappings_without_tokens_have_nothing_to_say() -> None:
    mappings = [{"inputs_embeds": torch.zeros(1, 4, 32)}]
    with pytest.raises(GossamerError, match="allocate=evolved takes the next-token loss"):
        gossamer.prune(causal("llama"), "Magnitude", "Unstructured", sparsity=0.5, allocate="evolved", data=mappings)
