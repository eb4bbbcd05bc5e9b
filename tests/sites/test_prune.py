"""The verb `prune` in Python: what it takes, what it refuses before touching anything, what it reports."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.allocate import erk, owl
from gossamer.sites._walk import targets
from tests.sites.families import causal, ids


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "Wandaa"}, "unknown method 'Wandaa'; did you mean Wanda"),
    ({"pattern": "Unstructred"}, "unknown pattern 'Unstructred'; did you mean Unstructured"),
    ({"pattern": "2:"}, "cannot read the pattern"),
    ({"pattern": "4:2"}, "0 < n < m"),
    ({"sparsity": 1.0}, r"\[0, 1\); got 1.0"),
    ({"sparsity": -0.1}, r"\[0, 1\)"),
    ({"sparsity": math.nan}, r"\[0, 1\)"),
    ({"sparsity": None}, "needs a sparsity"),
    ({"pattern": "1:4", "sparsity": 0.5}, r"fixes its own sparsity at 0.75, which contradicts 0.5"),
    ({"pattern": "TopK(k=2)", "sparsity": None, "allocate": "erk"}, "leaves no sparsity to allocate"),
    (
        {"pattern": "2:5", "sparsity": None},
        r"q_proj.weight: the pattern 2:5 needs an input dimension that 5 divides; shape \(32, 32\)",
    ),
    ({"pattern": "3x1"}, "rows that 3 divides"),
    ({"method": "SparseGPT", "pattern": "4x1"}, "SparseGPT is defined for the patterns Unstructured, NM, not for 4x1"),
    ({"method": "SparseGPT(damp=0)"}, "damp > 0"),
    ({"method": "SparseGPT(dampp=1)"}, "dampp"),
    ({"method": "Wanda", "data": None}, "Wanda needs calibration data"),
    ({"data": torch.zeros(2, 3)}, "token ids are integers"),
    ({"data": "no/such/file.txt"}, "no/such/file.txt"),
    ({"targets": "*.nothing"}, r"no weight matches '\*.nothing'; there are mlp.down_proj.weight"),
    ({"targets": "lm_head"}, "lm_head.weight stands outside the blocks"),
    ({"targets": "lm_head", "method": "Magnitude", "allocate": "owl"}, "where allocate=owl has no calibration"),
    ({"method": "DSnoT(init=SynFlow(rounds=3))"}, r"SynFlow\(rounds=3\) reaches a sparsity in rounds"),
    ({"method": "Asymmetric(SynFlow())"}, "reaches a sparsity in rounds, which no method around it does: take it alone"),
    ({"allocate": "erkk"}, "unknown allocation 'erkk'; did you mean erk"),
    ({"allocate": {"*.mlp.*": 0.5}}, "self_attn"),
    ({"allocate": "global_", "method": "SparseGPT"}, "ranks the scores of all weights together"),
    ({"allocate": 3}, "allocate= is a name"),
    ({"samples": 0, "data": "builtin"}, "samples"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change)[:60] for change, _ in BAD])
def test_a_mistake_is_one_clear_line_and_changes_nothing(change: dict[str, Any], message: str, tiny_tokenizer: Any) -> None:
    model = causal("llama")
    before = snapshot(model)
    asked = {
        "method": "Wanda",
        "pattern": "Unstructured",
        "sparsity": 0.5,
        "data": ids(),
        "tokenizer": tiny_tokenizer,
        **change,
    }
    method, pattern = asked.pop("method"), asked.pop("pattern")
    with pytest.raises(gossamer.GossamerError, match=message) as caught:
        gossamer.prune(model, method, pattern, **asked)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["Magnitude", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed(method: str, value: float) -> None:
    model = causal("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    before = snapshot(model)
    with pytest.raises(gossamer.GossamerError, match=r"layers.1.mlp.up_proj.weight: 1 of 2048 weights are NaN or infinite"):
        gossamer.prune(model, method, "2:4", data=ids())
    assert all(torch.equal(a, b) or name.endswith("1.mlp.up_proj.weight") for (name, a), b in
               zip(before.items(), model.state_dict().values(), strict=True))  # fmt: skip


def test_the_comparison_group_left_open_is_the_methods_own() -> None:
    rows, whole = causal("llama"), causal("llama")
    by_row = gossamer.prune(rows, "Wanda", "Unstructured", sparsity=0.5, data=ids())
    over_all = gossamer.prune(whole, "Wanda", "Unstructured(per='tensor')", sparsity=0.5, data=ids())
    assert by_row.recipe["pattern"] == "Unstructured(per='row')"
    assert over_all.recipe["pattern"] == "Unstructured(per='tensor')"
    weight = rows.model.layers[0].mlp.up_proj.weight
    assert (weight.count_nonzero(1) == 16).all()
    assert not (whole.model.layers[0].mlp.up_proj.weight.count_nonzero(1) == 16).all()


def test_targets_by_name_and_glob() -> None:
    model = causal("llama")
    before = snapshot(model)
    report = gossamer.prune(model, "Magnitude", "2:4", targets="*.mlp.*, model.layers.0.self_attn.q_proj")
    assert len(report.weights) == 7
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {row["name"] for row in report.weights}


def test_the_head_is_pruned_only_when_asked_for_by_name() -> None:
    model = causal("llama")
    assert all(t.block is not None for t in targets(model, "*"))
    report = gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.25, targets="lm_head.weight")
    assert [row["name"] for row in report.weights] == ["lm_head.weight"]
    assert int((model.lm_head.weight == 0).sum()) == 128 * 32 // 4


@pytest.mark.parametrize(
    "allocate",
    [
        "erk",
        "global_",
        "owl",
        erk,
        owl,
        "owl(outlier=3.0, spread=0.2)",
        "global_(floor=0.1)",
        "by(RIA, owl)",
        "by(Magnitude, global_(least=9))",
        "sap",
        "ecoflap(samples=1)",
        "searched(steps=8)",
    ],
)
def test_allocations_differ_by_weight_and_reach_the_total(allocate: Any) -> None:
    report = gossamer.prune(causal("llama"), "Wanda", "Unstructured(per='tensor')", sparsity=0.6, allocate=allocate, data=ids())
    entries = report.totals["entries"]
    assert abs(report.totals["nnz"] - 0.4 * entries) <= len(report.weights)
    if allocate in ("erk", "global_"):
        assert len({row["nnz"] / math.prod(row["shape"]) for row in report.weights}) > 1


def test_a_mapping_is_an_allocation_and_its_values_are_the_total() -> None:
    report = gossamer.prune(causal("llama"), "Magnitude", "Unstructured", allocate={"*.self_attn.*": 0.25, "*.mlp.*": 0.75})
    assert {row["sparsity"] for row in report.weights if "mlp" in row["name"]} == {0.75}
    assert {row["sparsity"] for row in report.weights if "attn" in row["name"]} == {0.25}


def test_the_report_tells_the_truth_and_survives_json(tmp_path: Path) -> None:
    model = causal("llama")
    report = gossamer.prune(model, "SparseGPT", "2:4", data=ids())
    state = model.state_dict()
    for row in report.weights:
        assert row["nnz"] == int(state[row["name"]].count_nonzero())
        assert row["shape"] == list(state[row["name"]].shape)
        assert row["tokens"] == 64
        assert row["damp"] == 0.01
    report.save(tmp_path / "report.json")
    assert gossamer.Report.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["sparsity"] == 0.5
    named = [v for k, v in report.seconds.items() if k != "total"]
    assert sum(named) == pytest.approx(report.seconds["total"], rel=0.05)


def test_sparsegpt_moves_kept_weights_and_beats_its_own_mask_through_the_whole_model() -> None:
    dense = causal("llama")
    with torch.no_grad():
        wanted = dense.model(ids()).last_hidden_state
    errors = {}
    for method in ("Magnitude", "Wanda", "SparseGPT"):
        model = causal("llama")
        gossamer.prune(model, method, "2:4", data=ids())
        with torch.no_grad():
            errors[method] = float((model.model(ids()).last_hidden_state - wanted).square().mean())
    before, after = dense.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight
    kept = after != 0
    assert not torch.equal(before[kept], after[kept])
    assert errors["SparseGPT"] < errors["Wanda"]
    assert errors["SparseGPT"] < errors["Magnitude"]


def test_the_same_seed_gives_the_same_bits(tiny_tokenizer: Any) -> None:
    text = {"data": "builtin", "tokenizer": tiny_tokenizer, "seqlen": 16, "samples": 4}
    runs = []
    for seed in (0, 0, 1):
        model = causal("llama")
        gossamer.prune(model, "SparseGPT", "Unstructured", sparsity=0.5, seed=seed, **text)
        runs.append(torch.cat([t.parameter.flatten() for t in targets(model)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_rank_deficient_calibration_is_damped_and_stays_finite() -> None:
    model = causal("llama")
    report = gossamer.prune(model, "SparseGPT", "2:4", data=torch.zeros(1, 2, dtype=torch.int64))
    assert report.totals["sparsity"] == 0.5
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(row["damp"] >= 0.01 for row in report.weights)


def test_save_writes_what_plain_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = causal("llama")
    report = gossamer.prune(model, "Magnitude", "2:4")
    gossamer.save(model, tmp_path / "out", report=report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    kept = json.loads((tmp_path / "out" / "sparsity.json").read_text())["weights"]
    assert kept["model.layers.0.mlp.up_proj.weight"] == {"shape": [64, 32], "sparsity": 0.5, "nnz": 1024}
    assert "sparsity_config" not in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(gossamer.GossamerError, match="not empty"):
        gossamer.save(model, tmp_path / "out")
    gossamer.save(model, tmp_path / "out", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
