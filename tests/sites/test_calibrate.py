"""What calibration hands over: the inputs a weight really gets, after everything before it has been pruned."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.core.stats import Stats
from gossamer.sites._calibrate import Calibration
from gossamer.sites._gradients import gradients
from gossamer.sites._lockstep import lockstep
from gossamer.sites._walk import targets
from tests.sites.families import CAUSAL, causal, ids


def batches(lanes: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids().tensor_split(lanes)]


def dense_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return the inputs of every linear in one plain forward of the model as it is now."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        t.module.register_forward_pre_hook(lambda m, args, name=t.name: seen.__setitem__(name, args[0].detach()))
        for t in targets(model)
        if not t.stacked
    ]
    with torch.no_grad():
        model(ids(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", [f for f in CAUSAL if f not in ("mixtral", "qwen3_moe")])
def test_statistics_are_those_of_a_plain_forward(family: str) -> None:
    """Nothing is pruned here, so each block's inputs must be what the untouched model computes, its own arguments included."""
    model = causal(family)
    expected = dense_inputs(model)
    found: dict[str, Stats] = {}
    walk = Calibration(model, batches(), frozenset({"gram"}))
    for index in range(2):
        inside = [t for t in targets(model) if t.block == index]
        walk.block(index, inside, lambda target, stats: found.__setitem__(target.name, stats[0]))
    assert list(found)
    assert set(found) == set(expected)
    for name, x in expected.items():
        x = x.reshape(-1, x.shape[-1]).double()
        gram = found[name].symmetric_gram().double()
        torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4 * float((x.T @ x).abs().max()))
        assert found[name].tokens == 64


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_each_weight_is_pruned_by_its_inputs_in_the_model_pruned_so_far(family: str) -> None:
    """Wanda by hand: go through the weights in the order they are used, a plain forward before each."""
    model, by_hand = causal(family), causal(family)
    gossamer.prune(model, "Wanda", "2:4", data=ids())
    order: list[str] = []
    for t in targets(by_hand):
        t.module.register_forward_pre_hook(lambda m, args, name=t.name: order.append(name))
    by_hand(ids())
    by_name = {t.name: t for t in targets(by_hand)}
    for name in list(order):
        x = dense_inputs(by_hand)[name].reshape(-1, by_name[name].matrices().shape[-1])
        matrix = by_name[name].matrices()[0]
        mask = gossamer.NM(2, 4).select(matrix.abs() * x.norm(dim=0))
        matrix.mul_(mask)
    for ours, theirs in zip(targets(model), targets(by_hand), strict=True):
        assert torch.equal(ours.parameter != 0, theirs.parameter != 0), ours.name


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_the_number_of_lanes_changes_nothing_but_rounding(lanes: int) -> None:
    masks = []
    for n in (3, lanes):
        model = causal("llama")
        gossamer.prune(model, "SparseGPT", "2:4", data=ids(), lanes=n)
        masks.append(torch.cat([t.parameter.flatten() for t in targets(model)]))
    torch.testing.assert_close(*masks, rtol=1e-3, atol=1e-5)


def test_weights_that_share_an_input_share_its_statistics() -> None:
    model = causal("llama")
    found: dict[str, Stats] = {}
    inside = [t for t in targets(model) if t.block == 0]
    Calibration(model, batches(), frozenset({"gram"})).block(
        0, inside, lambda t, s: found.__setitem__(t.name.split(".")[-2], s[0])
    )
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(s) for s in found.values()}) == 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_expert_sees_the_tokens_routed_to_it(family: str) -> None:
    model = causal(family)
    routed: dict[int, list[torch.Tensor]] = {}

    def spy(_m: nn.Module, args: tuple[Any, ...]) -> None:
        hidden, chosen = args[0], args[1]
        for expert in range(4):
            rows = (chosen == expert).any(-1).nonzero()[:, 0]
            routed.setdefault(expert, []).append(hidden[rows])

    block = model.model.layers[0]
    handle = block.mlp.experts.register_forward_pre_hook(spy)
    with torch.no_grad():
        model(ids(), use_cache=False)
    handle.remove()
    found: dict[str, list[Stats]] = {}
    inside = [t for t in targets(model) if t.block == 0]
    Calibration(model, batches(), frozenset({"gram"})).block(0, inside, lambda t, s: found.__setitem__(t.attribute, s))
    for expert in range(4):
        x = torch.cat(routed[expert])
        stats = found["gate_up_proj"][expert]
        assert stats.tokens == len(x) == found["down_proj"][expert].tokens
        torch.testing.assert_close(stats.symmetric_gram(), x.T @ x, rtol=1e-3, atol=1e-3)


def test_an_expert_no_token_reached_is_ranked_by_magnitude_and_says_so() -> None:
    model = causal("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[3] = 0.0
        block.mlp.gate.weight.data[:3] = 10 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).abs()
        block.post_attention_layernorm.weight.data.fill_(1.0)
    dense = model.model.layers[0].mlp.experts.down_proj[3].detach().clone()
    with torch.no_grad():  # all hidden features positive: expert 3's logit, zero, is always the lowest
        for block in model.model.layers:
            block.post_attention_layernorm.forward = lambda x: x.abs()
    report = gossamer.prune(model, "Wanda", "2:4", data=ids())
    row = next(r for r in report.weights if r["name"].endswith("0.mlp.experts.down_proj"))
    assert row["tokens"][3] == 0
    assert "magnitude" in row["note"]
    expected = gossamer.NM(2, 4).select(dense.abs())
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj[3] != 0, expected)


def test_gradients_are_those_of_the_mean_loss() -> None:
    model = causal("llama")
    chosen = targets(model)
    found = gradients(model, batches(), chosen)
    for p in model.parameters():
        assert p.grad is None
    torch.stack([model(input_ids=w, labels=w).loss for w in ids().split(1)]).mean().backward()
    for target in chosen:
        torch.testing.assert_close(found[target.name], target.module.weight.grad, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was_found() -> None:
    model = causal("mixtral").train()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    implementation = model.config._experts_implementation
    gossamer.prune(model, "Wanda", "2:4", data=ids())
    gossamer.prune(model, "Gradient", "Unstructured", sparsity=0.6, data=ids())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert model.config._experts_implementation == implementation
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_an_error_in_a_lane_comes_out_and_leaves_no_lane_waiting() -> None:
    from greenlet import getcurrent, greenlet

    model = causal("llama")
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken on purpose")))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        gossamer.prune(model, "Wanda", "2:4", data=ids())
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is greenlet and o is not getcurrent() and o and not o.dead]
    assert "forward" not in vars(model.model.layers[0])


def test_lanes_need_not_pause_at_the_same_keys() -> None:
    log: list[object] = []

    def lane(name: str, keys: list[int]) -> Any:
        def body(me: Any) -> None:
            for key in keys:
                log.append((name, key))
                me.pause(KEYS[key])

        return body

    KEYS = {n: (n,) for n in range(4)}
    lockstep([lane("a", [0, 2]), lane("b", [0, 1, 2]), lane("c", [3])], lambda k: k[0], lambda k: log.append(k[0]))  # type: ignore[index]
    visits = [entry for entry in log if isinstance(entry, int)]
    assert visits == [0, 1, 2, 3]
    assert log.index(2) > log.index(("b", 2))


def test_two_stacks_of_blocks_cannot_be_calibrated_and_the_error_says_what_can() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    with pytest.raises(GossamerError, match=r"2 stacks.*Magnitude"):
        gossamer.prune(model, "Wanda", "2:4", data=ids() % 64)
    assert gossamer.prune(model, "Magnitude", "2:4").totals["sparsity"] == 0.5


@pytest.mark.parametrize("family", [f for f in CAUSAL if f not in ("mixtral", "qwen3_moe")])
def test_cross_is_of_the_dense_models_inputs_and_the_pruned_ones(family: str) -> None:
    """Every weight is changed when it comes, and its cross statistics are those of two plain forwards, before and after."""
    model = causal(family)
    dense, found = dense_inputs(model), {}
    walk = Calibration(model, batches(), frozenset({"cross"}))

    def visit(target: Any, stats: list[Stats]) -> None:
        found[target.name] = stats[0].cross
        target.parameter.mul_(0.5)

    for index in range(2):
        walk.block(index, [t for t in targets(model) if t.block == index], visit)
    pruned = dense_inputs(model)
    assert set(found) == set(pruned)
    moved = 0
    for name, x in pruned.items():
        x = x.reshape(-1, x.shape[-1]).double()
        exact = (dense[name].reshape(x.shape).double() - x).T @ x
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-4, atol=1e-4 * float((x.T @ x).abs().max()))
        moved += bool(exact.abs().max() > 1e-3 * (x.T @ x).abs().max())
    assert moved > len(found) / 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_have_no_cross(family: str) -> None:
    model = causal(family)
    found: dict[str, Any] = {}
    walk = Calibration(model, batches(), frozenset({"cross"}))
    walk.block(0, [t for t in targets(model) if t.block == 0], lambda t, stats: found.__setitem__(t, [s.cross for s in stats]))
    for target, cross in found.items():
        assert all(c is None for c in cross) == target.stacked
