"""Methods that solve an MLP as one: in every family, from its real wiring, and refused before anything has changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.sites._mlp import mlps, wired
from gossamer.sites._walk import targets
from tests.sites.families import CAUSAL, SIZES, causal, ids

MOE = ("mixtral", "qwen3_moe")
DENSE = [family for family in CAUSAL if family not in MOE]
GATED = {"llama", "mistral", "qwen3", "gemma3"}


def fused(seed: int = 0) -> Any:
    """A tiny model whose gate and up are one weight."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_biases(model: Any) -> Any:
    """They start at zero, where none of them shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("family", DENSE)
def test_the_activation_is_found_by_what_the_model_does(family: str) -> None:
    model = with_biases(causal(family))
    found = mlps(model, targets(model), "SparseLLM")
    assert list(found) == [0, 1]
    assert {mlp.gated for mlp in found.values()} == {family in GATED}
    wiring = wired(list(found.values()), lambda: model(ids()), "SparseLLM")
    made = torch.linspace(-3, 3, 13)
    expected = {"opt": "relu", "gemma3": "gelu_pytorch_tanh"}.get(family, "silu" if family in GATED else "gelu")
    from transformers.activations import ACT2FN

    for one in wiring.values():
        assert torch.allclose(one.act(made), ACT2FN[expected](made), atol=2e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(("pattern", "sparsity"), [("Unstructured", 0.6), ("2:4", None), ("NM(2, 4, permute=True)", None)])
def test_every_family_is_pruned_exactly_and_its_mlps_come_out_nearer(family: str, pattern: str, sparsity: float | None) -> None:
    model = with_biases(causal(family))
    report = gossamer.prune(model, "SparseLLM(steps=4)", pattern, sparsity=sparsity, data=ids(8, 16))
    assert len(report.weights) == 2 * CAUSAL[family][2]
    for row in report.weights:
        entries = row["shape"][0] * row["shape"][1]
        exact = round(0.4 * entries) if sparsity else entries // 2
        assert row["nnz"] == exact or (row["nnz"] < exact and row["dead_inputs"] > 0)  # what reads nothing is zero too
    told = [row for row in report.weights if "mlp_error" in row]
    assert len(told) == 2
    assert all(row["mlp_error"] <= row["mlp_error_start"] for row in told)
    assert any(row["mlp_error"] < row["mlp_error_start"] for row in told) or "permute" in pattern
    assert all(("permuted" in row) == ("permute" in pattern) for row in told)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "phi3"])
@pytest.mark.parametrize("pattern", ["2:4", "NM(2, 4, permute=True)"])
def test_the_error_told_is_the_models(family: str, pattern: str) -> None:
    """Of the first block, whose inputs pruning has not changed: attention is left out, and the MLP's outputs are compared."""
    model = with_biases(fused() if family == "phi3" else causal(family))
    found = mlps(model, targets(model), "SparseLLM")[0]
    outputs: list[torch.Tensor] = []
    found.out.module.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with torch.no_grad():
        model(ids(8, 16))
    names = ",".join(target.name for target in found.all)
    report = gossamer.prune(model, "SparseLLM(steps=3)", pattern, data=ids(8, 16), targets=names)
    groups = found.out.matrices()[0].reshape(-1, 4).count_nonzero(1)
    assert (groups == 2).all() or family == "opt"  # where channels are dead, and fewer stay
    assert (groups <= 2).all()
    outputs[1:] = []
    with torch.no_grad():
        model(ids(8, 16))
    dense, now = outputs[0].double(), outputs[-1].double()
    assert report.weights[-1]["mlp_error"] == pytest.approx(
        float((now - dense).square().sum() / dense.square().sum()), rel=1e-3
    )


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_steps_are_sparsegpt(family: str) -> None:
    one, other = causal(family), causal(family)
    gossamer.prune(one, "SparseLLM(steps=0)", "2:4", data=ids(8, 16))
    gossamer.prune(other, "SparseGPT", "2:4", data=ids(8, 16))
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, other.state_dict()[name], atol=1e-4), name


def test_a_fused_gate_is_one_weight_and_each_weight_has_its_own_sparsity() -> None:
    model = fused()
    report = gossamer.prune(model, "SparseLLM(steps=2)", "Unstructured", sparsity=0.5, data=ids(8, 16))
    assert {row["nnz"] * 2 == row["shape"][0] * row["shape"][1] for row in report.weights} == {True}
    model = causal("llama")
    share = {"*.up_proj.*": 0.25, "*.gate_proj.*": 0.75, "*.down_proj.*": 0.5, "*self_attn*": 0.125}
    report = gossamer.prune(model, "SparseLLM(steps=2)", "Unstructured", allocate=share, data=ids(8, 16))
    for row in report.weights:
        wanted = next(value for name, value in share.items() if name.strip("*.") in row["name"])
        assert row["sparsity"] == wanted


def refused(model: Any, match: str, **asked: Any) -> None:
    before = state(model)
    with pytest.raises(GossamerError, match=match) as caught:
        gossamer.prune(model, asked.pop("method", "SparseLLM"), "2:4", data=ids(), **asked)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", MOE)
def test_a_block_without_one_known_mlp_is_refused(family: str) -> None:
    refused(
        causal(family), r"SparseLLM solves a block's MLP as one, and block 0 of \w+ has none, or several; known by the names"
    )


@pytest.mark.parametrize("names", ["*self_attn*", "*.up_proj,*.gate_proj", "*.0.mlp.*,*.1.mlp.down_proj"])
def test_part_of_an_mlp_is_refused(names: str) -> None:
    refused(causal("llama"), "is no target: give all of it", targets=names)


def test_no_method_goes_around_it() -> None:
    refused(
        causal("llama"), "SparseLLM solves a block's MLP as one, which no method around it", method="Asymmetric(SparseLLM())"
    )


class _Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.silu(x)


@pytest.mark.parametrize("index", [0, 1])
def test_an_mlp_that_does_more_is_refused_before_anything_has_changed(index: int) -> None:
    model = causal("llama")
    mlp = model.model.layers[index].mlp
    mlp.forward = lambda x: mlp.down_proj(2 * mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    refused(model, rf"model\.layers\.{index}\.mlp\.down_proj\.weight is no such thing: its block does more")
    model = causal("llama")
    mlp = model.model.layers[index].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x.flip(-1)))
    refused(model, "its block does more")
    model = causal("llama")  # an activation of its own, and the gate called last, are as good as any
    mlp = model.model.layers[index].mlp
    mlp.act_fn = _Twice()

    def forward(x: torch.Tensor) -> Any:
        up = mlp.up_proj(x)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

    mlp.forward = forward
    report = gossamer.prune(model, "SparseLLM(steps=2)", "2:4", data=ids())
    assert report.totals["sparsity"] == 0.5


def test_a_streamed_run_is_refused_too_and_leaves_nothing(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    causal("llama").save_pretrained(tmp_path / "in")
    tiny_tokenizer.save_pretrained(tmp_path / "in")
    scaled = lambda self, x: self.down_proj(2 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731
    monkeypatch.setattr(LlamaMLP, "forward", scaled)
    with pytest.raises(GossamerError, match="its block does more"):
        gossamer.prune_checkpoint(tmp_path / "in", tmp_path / "out", "SparseLLM", "2:4", data="builtin", seqlen=16, samples=4)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_block_may_be_moved_to_where_it_is_worked_on() -> None:
    one, other = causal("llama"), causal("llama")
    gossamer.prune(one, "SparseLLM(steps=2)", "2:4", data=ids(8, 16))
    gossamer.prune(other, "SparseLLM(steps=2)", "2:4", data=ids(8, 16), device="cpu")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_the_order_in_which_gate_and_up_are_called_changes_nothing() -> None:
    one, other = causal("llama"), causal("llama")
    for layer in other.model.layers:

        def forward(x: torch.Tensor, mlp: Any = layer.mlp) -> Any:
            up = mlp.up_proj(x)
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

        layer.mlp.forward = forward
    for model in (one, other):
        gossamer.prune(model, "SparseLLM(steps=2)", "2:4", data=ids(8, 16))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_in_bfloat16() -> None:
    model = causal("llama", torch.bfloat16)
    report = gossamer.prune(model, "SparseLLM(steps=2)", "2:4", data=ids(8, 16))
    assert report.totals["sparsity"] == 0.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_activation_that_overwrites_its_input_is_as_good_as_any() -> None:
    told = []
    for inplace in (False, True):
        model = with_biases(causal("opt"))
        for module in model.modules():
            if hasattr(module, "activation_fn"):
                module.activation_fn = nn.ReLU(inplace=inplace)
        gossamer.prune(model, "SparseLLM(steps=4)", "2:4", data=ids(8, 16))
        told.append(state(model))
    assert all(torch.equal(tensor, told[1][name]) for name, tensor in told[0].items())
