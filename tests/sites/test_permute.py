"""N:M with reordered input channels: the model computes what it did, and more of the score is kept."""

from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM
from gossamer.sites._calibrate import Calibration
from gossamer.sites._permute import channels_of, free
from gossamer.sites._walk import targets
from tests.sites.families import CAUSAL, causal, ids

PERMUTED = NM(2, 4, permute=True)
# what each family lets be reordered: a weight that is missing here stays in its order
FREE = {
    "llama": {"o_proj", "down_proj"},
    "mistral": {"o_proj", "down_proj"},
    "qwen3": {"o_proj", "down_proj"},
    "gemma3": {"o_proj", "down_proj"},
    "phi": {"dense", "fc2"},
    "opt": {"out_proj", "fc2"},
    "gpt2": {"c_proj"},  # that of the MLP; query, key and value are one weight
    "gpt_neox": {"dense_4h_to_h"},
    "bloom": {"dense_4h_to_h"},
    "falcon": {"dense_4h_to_h"},
    "mixtral": {"o_proj"},
    "qwen3_moe": {"o_proj"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(4, 16)).logits


@pytest.mark.parametrize("family", CAUSAL)
def test_a_folded_order_changes_nothing_but_the_order(family: str) -> None:
    model = causal(family)
    for name, parameter in model.named_parameters():  # biases start at zero, where no order shows
        if name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    before = logits(model)
    walk = Calibration(model, [{"input_ids": ids()}], frozenset({"norm"}))
    found = set()
    for target in targets(model):
        channels = channels_of(model, walk.blocks[target.block], target)
        if channels is None:
            continue
        found.add(target.name.split(".")[-2])
        was = target.parameter.clone()
        if target.block == 0:
            assert free(walk, 0, channels)
            assert torch.equal(target.parameter, was), "put back to the bit"
        channels.fold(torch.rand(channels.heads, channels.size, generator=torch.Generator().manual_seed(2)).argsort(1))
        assert not torch.equal(target.parameter, was)
    assert found == FREE[family]
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["Wanda", "Magnitude", "SparseGPT", "ALPS", "Asymmetric(SparseGPT())", "Parallel(SparseGPT())"]
)
def test_more_of_the_score_is_kept_and_the_pattern_holds(method: str) -> None:
    model = causal("llama")
    report = gossamer.prune(model, method, PERMUTED, data=ids())
    for row in report.weights:
        reordered = row["name"].split(".")[-2] in FREE["llama"]
        assert ("permuted" in row) == reordered
        assert not reordered or row["permuted"] >= 0
        assert row["sparsity"] == 0.5
    assert max(row.get("permuted", 0) for row in report.weights) > 0.01
    for target in targets(model):
        assert (target.parameter.view(-1, 4).count_nonzero(1) == 2).all(), target.name


def test_every_weight_is_the_plain_pruning_of_the_reordered_one() -> None:
    """What went through the block before its channels were put in order is what the finished model computes."""
    model, dense = causal("llama", num_hidden_layers=1), causal("llama", num_hidden_layers=1)
    seen = {}

    def inputs(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen["x"] = args[0].detach().reshape(-1, args[0].shape[-1])

    gossamer.prune(model, "Wanda", PERMUTED, data=ids())
    down, was = (m.model.layers[0].mlp.down_proj for m in (model, dense))
    with_hook = down.register_forward_pre_hook(inputs)
    logits(model)
    with_hook.remove()
    order = [int((was.weight == column[:, None]).sum(0).argmax()) for column in down.weight.T]
    assert sorted(order) == list(range(64))
    whole = was.weight.data[:, order]
    expected = whole * NM(2, 4).select(whole.abs() * seen["x"].norm(dim=0))
    torch.testing.assert_close(down.weight.data, expected)


class Gated(nn.Module):
    """Stands between the channels and the linear that reads them, with a gain for each."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.gain = inner, torch.linspace(0.5, 2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gain.to(x.dtype)


def test_channels_that_are_not_free_are_left_alone() -> None:
    model, plain = causal("llama"), causal("llama")
    for m in (model, plain):
        for block in m.model.layers:
            block.mlp.act_fn = Gated(block.mlp.act_fn, 64)
    report = gossamer.prune(model, "Wanda", PERMUTED, data=ids(), targets="*.down_proj")
    gossamer.prune(plain, "Wanda", "2:4", data=ids(), targets="*.down_proj")
    assert not any("permuted" in row for row in report.weights)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_what_cannot_be() -> None:
    with pytest.raises(GossamerError, match="needs calibration data"):
        gossamer.prune(causal("llama"), "Magnitude", PERMUTED)
    with pytest.raises(GossamerError, match="leave permute out"):
        gossamer.prune(causal("llama"), "Gradient", PERMUTED, data=ids())
