"""Tuning by adapters and by parts: what `gossamer.tune` promises, and what merging an ordinary LoRA costs."""

import copy
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from tests.adapters.models import BASES, logits, pruned, same_zeros, train, weights
from tests.sites.families import causal, ids

ADAPTERS = ["MaskLoRA", "ScaleLoRA", "LoRAPrune", "SPP"]
DROPS = pytest.mark.filterwarnings("ignore:merging dropped")


def start(model: Any, method: str, steps: int = 4, **more: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    tuning = gossamer.tune(model, method, steps=steps, **more)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-2)
    return tuning.attach(optimizer), optimizer


def go(tuning: Any, optimizer: torch.optim.Optimizer, first: int = 0, last: int = 4) -> float:
    tuning.model.train()
    for step in range(first, last):
        loss = tuning.model(input_ids=ids(seed=step), labels=ids(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@DROPS
@pytest.mark.parametrize("pattern", BASES)
@pytest.mark.parametrize("method", [f"{name}(rank=4)" for name in ADAPTERS])
def test_adapters_end_with_the_same_zeros(method: str, pattern: str) -> None:
    model = pruned(pattern)
    model.lm_head.weight.requires_grad_(False)
    before, told = weights(model), logits(model)
    tuning, optimizer = start(model, method)
    go(tuning, optimizer)
    plain = tuning.finish()
    assert plain is model
    assert tuning.model is model
    assert same_zeros(before, weights(plain))
    assert not torch.equal(logits(plain.eval()), told)
    trains = {n for n, p in plain.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in plain.named_parameters()} - {"lm_head.weight"}  # as before
    again = start(plain, method)[0].model  # and again, on what came out
    assert again.peft_config["default"].r == 4


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("Unstructured", 0.75), ("4x1", 0.5), ("TopK(8)", None)])
def test_pst_ends_with_the_pattern(pattern: str, sparsity: float | None) -> None:
    tuning, optimizer = start(causal("llama"), "PST(rank=4)", pattern=pattern, sparsity=sparsity)
    go(tuning, optimizer)
    for w in weights(tuning.finish()).values():
        assert float((w != 0).float().mean()) == (8 / w.shape[1] if "TopK" in pattern else 1 - (sparsity or 0.5))


@DROPS
@pytest.mark.parametrize("method", [*ADAPTERS, "PST", "PERP"])
def test_resume_continues_bit_for_bit(method: str) -> None:
    pattern = {"pattern": "2:4"} if method == "PST" else {}
    base = pruned(family="phi") if method == "PERP" else pruned()
    tuning, optimizer = start(copy.deepcopy(base), method, **pattern)
    go(tuning, optimizer, 0, 2)
    state, moments = tuning.state_dict(), copy.deepcopy(optimizer.state_dict())
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    go(tuning, optimizer, 2, 4)
    again, other = start(copy.deepcopy(base), method, **pattern)
    again.load_state_dict(state)
    other.load_state_dict(moments)
    go(again, other, 2, 4)
    a, b = tuning.finish().state_dict(), again.finish().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_state_of_other_zeros_is_refused() -> None:
    state = start(pruned(), "MaskLoRA")[0].state_dict()
    with pytest.raises(GossamerError, match="made on other zeros than"):
        start(pruned("Unstructured"), "MaskLoRA")[0].load_state_dict(state)
    with pytest.raises(GossamerError, match="of other parts"):
        start(pruned(), "PERP(parts='norm')")[0].load_state_dict(state)


def test_what_tune_refuses() -> None:
    model = pruned()
    with pytest.raises(GossamerError, match="unexpected keyword argument 'lora_dropout'; its signature is"):
        gossamer.tune(model, "MaskLoRA(lora_dropout=0.1)", steps=1)
    with pytest.raises(GossamerError, match="keeps the zeros that are there"):
        gossamer.tune(model, "MaskLoRA", "2:4", steps=1)
    with pytest.raises(GossamerError, match="chooses the mask: say by which pattern"):
        gossamer.tune(model, "PST", steps=1)
    with pytest.raises(GossamerError, match="has no bias to train; it has: norm, head"):
        gossamer.tune(model, "PERP(parts='bias')", steps=1)
    with pytest.raises(GossamerError, match="PERP trains parts, of bias, norm, head; not 'biases'"):
        gossamer.tune(model, "PERP(parts='biases')", steps=1)
    with pytest.raises(GossamerError, match="none of the 14 weights has zeros for MASKLORA to keep"):
        gossamer.tune(causal("llama"), "MaskLoRA", steps=1)
    assert not any("gossamer" in n for n, _ in model.named_modules())


def test_targets_are_named_as_in_prune() -> None:
    tuning = gossamer.tune(pruned(), "MaskLoRA(rank=2)", steps=1, targets="*.mlp.*")
    assert len(tuning.model.base_model.layers) == 6


@pytest.mark.parametrize(
    ("parts", "family", "names"),
    [
        ("bias", "phi", {"bias"}),
        ("norm", "llama", {"weight"}),
        ("bias,norm", "gpt2", {"bias", "weight"}),
        ("head", "llama", {"weight"}),
        (None, "llama", {"weight"}),
    ],
)
def test_perp_trains_its_parts_alone(parts: str | None, family: str, names: set[str]) -> None:
    model = pruned(family=family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuning, optimizer = start(model, f"PERP(parts={parts!r})")
    go(tuning, optimizer)
    assert tuning.finish() is model
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.rpartition(".")[2] for n in moved} == names
    assert all(any(word in n for word in ("bias", "norm", "ln_", "lm_head")) for n in moved)
    assert all(p.requires_grad for p in model.parameters())


def test_perp_holds_the_zeros_of_a_pruned_head() -> None:
    model = pruned()
    gossamer.prune(model, "Magnitude", "2:4", targets="lm_head")
    tuning, optimizer = start(model, "PERP(parts='head')")
    go(tuning, optimizer)
    assert float((tuning.finish().lm_head.weight == 0).float().mean()) == 0.5


def test_the_import_of_gossamer_loads_no_peft() -> None:
    code = "import sys, gossamer; gossamer.MaskLoRA(rank=4); sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "LoRAPrune", "MaskLoRA"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_puts_the_zeros_back_and_says_what_it_costs(family: str, kind: str, data: bool) -> None:
    base = pruned(family=family)
    before = weights(base)
    torch.manual_seed(0)
    if kind in ("lora", "dora"):
        names = [n.removesuffix(".weight") for n in before if "embed" not in n and "wte" not in n and "wpe" not in n]
        config = peft.LoraConfig(r=4, target_modules=names, use_dora=kind == "dora", fan_in_fan_out=family == "gpt2")
        model = peft.get_peft_model(base, config)
    else:
        model = gossamer.tune(base, kind, steps=3).model
    train(model)
    free = copy.deepcopy(model)
    plain, report = gossamer.merge(model, keep="mask", data=ids() if data else None)
    after = weights(plain)
    assert same_zeros(before, after)
    assert report.kind == "merge"
    assert report.totals["sparsity"] == 0.5
    assert [row["zeroed"] for row in report.weights] == [0] * len(report.weights)
    errors = {row["name"]: row["weight_error"] for row in report.weights}
    assert set(errors) == {n for n in before if "embed" not in n and "wte" not in n and "wpe" not in n}
    assert all(("output_error" in row) == data for row in report.weights)
    if kind == "MaskLoRA":
        assert set(errors.values()) == {0.0}
        return
    assert all(0.001 < error < 1 for error in errors.values())
    if kind in ("lora", "dora"):
        full = weights(free.merge_and_unload())
        for name, error in errors.items():
            masked = full[name] * (before[name] != 0)
            assert error == pytest.approx(float((full[name] - masked).norm() / full[name].norm()), rel=1e-4)
            torch.testing.assert_close(after[name], masked)


def test_the_output_error_by_hand() -> None:
    base = pruned()
    names = ["model.layers.0.mlp.down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names))
    model.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight.data.normal_()
    full = copy.deepcopy(model).merge_and_unload()
    linear, seen = full.model.layers[0].mlp.down_proj, []
    linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    full(input_ids=ids())
    w, kept = linear.weight, pruned().model.layers[0].mlp.down_proj.weight != 0
    wanted = float((seen[0] @ (w * ~kept).t()).norm() / (seen[0] @ w.t()).norm())
    _, report = gossamer.merge(model, data=ids())
    assert report.weights[0]["output_error"] == pytest.approx(wanted, rel=1e-4)


def test_what_merge_refuses() -> None:
    base = pruned()
    with pytest.raises(GossamerError, match=r"merge wants a peft model, .* not a Llama"):
        gossamer.merge(base)
    model = peft.get_peft_model(causal("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(GossamerError, match=r"none of the 2 adapted weights has zeros to keep: model\.merge_and_unload\(\)"):
        gossamer.merge(model)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(GossamerError, match="keep='mask' is what there is, not 'all'"):
        gossamer.merge(model, keep="all")
    before = weights(model)
    for data in (torch.rand(2, 4), torch.full((2, 4), 999)):
        with pytest.raises(GossamerError, match="token id"):
            gossamer.merge(model, data=data)
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    model.merge_adapter()
    with pytest.raises(GossamerError, match="merged already"):
        gossamer.merge(model)
    model = gossamer.tune(pruned(), "PST", "2:4", steps=1).model
    with pytest.raises(GossamerError, match="chooses its own zeros"):
        gossamer.merge(model)
