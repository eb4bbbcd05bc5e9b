"""MaskLLM by hand: its candidates, what a step's mask is, the prior, the regulariser's gradient, and the choice in the end."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.tuners.maskllm import candidates
from tests.sites.families import causal, ids
from tests.tuners.loops import adamw, loss_of, train


def test_the_candidates_are_all_masks() -> None:
    for n, m in [(1, 2), (2, 4), (1, 4), (4, 8), (3, 5)]:
        table = candidates(n, m)
        rows = {tuple(row) for row in table.int().tolist()}
        assert rows == {bits for bits in itertools.product((0, 1), repeat=m) if sum(bits) == n}
        assert len(table) == math.comb(m, n)
    with pytest.raises(GossamerError, match="8:16 has more than 1000 masks"):
        candidates(8, 16)


def only(tuning: Any) -> tuple[Any, Any]:
    return next(iter(tuning._layers.items()))


def test_the_mask_of_a_step(tiny_llama: Callable[..., Any]) -> None:
    tuning = gossamer.tune(tiny_llama().train(), "MaskLLM", "2:4", steps=5, targets="*.0.mlp.up_proj")
    weight, layer = only(tuning)
    assert layer.logits.shape == (1, 64, 8, 6)
    assert (layer.temperature, layer.scale) == (4.0, 100.0)
    noise = torch.empty(1, 64, 8, 6).exponential_(generator=layer._generator(layer.logits.device, 0)).log().neg()
    y = torch.exp((100 * layer.logits + noise) / 4)
    y = y / y.sum(-1, keepdim=True)
    by_hand = sum(y[..., i, None] * candidates(2, 4)[i] for i in range(6)).flatten(-2)
    assert torch.allclose(layer.soft(), by_hand, atol=1e-6)
    assert torch.allclose(layer.soft().unflatten(-1, (-1, 4)).sum(-1), torch.tensor(2.0), atol=1e-5)
    assert torch.equal(layer.soft(), layer.soft())  # one noise a step, whatever is computed again
    assert torch.allclose(layer.train()(weight.parameter), weight.parameter * by_hand[0], atol=1e-6)
    assert torch.equal(layer.eval()(weight.parameter), weight.parameter * layer.hard()[0])
    layer.train()
    optimizer = adamw(tuning)
    tuning.attach(optimizer)
    first = layer.soft().detach()
    train(tuning, optimizer, 4)
    assert (layer.temperature, layer.scale) == (pytest.approx(0.05), 500.0)  # the last step's
    assert not torch.equal(layer.soft(), first)


def test_the_noise_is_gumbels(tiny_llama: Callable[..., Any]) -> None:
    tuning = gossamer.tune(
        tiny_llama(), "MaskLLM(prior=0.0, temperature=(1e-3, 1e-3))", "2:4", steps=5, targets="*.mlp.up_proj"
    )
    _, layer = only(tuning)
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]).log() / layer.scale)
    drawn = []
    for layer.step in range(100):
        drawn.append(layer.soft().detach().mean((0, 1)).unflatten(-1, (-1, 4)).mean(0))
    chances = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]) @ candidates(2, 4)
    assert torch.allclose(torch.stack(drawn).mean(0), chances, atol=0.01)


def test_the_prior_is_the_mask_that_is_there(tiny_llama: Callable[..., Any]) -> None:
    dense, model = tiny_llama(), tiny_llama()
    gossamer.prune(model, "SparseGPT", "2:4", data=ids(seed=3), progress=False)
    kept = model.model.layers[1].mlp.up_proj.weight.detach() != 0
    tuning = gossamer.tune(model, "MaskLLM(prior=100.0)", "2:4", steps=5, teacher=dense, targets="*.1.mlp.up_proj")
    weight, layer = only(tuning)
    assert torch.equal(layer.hard()[0].bool(), kept)
    assert torch.equal(weight.parameter, dense.model.layers[1].mlp.up_proj.weight)  # its weights are the teacher's
    table = candidates(2, 4)
    likeness = torch.stack([(kept.unflatten(-1, (-1, 4)).float() * s).sum(-1) for s in table], -1) - 1
    noise = layer.logits.detach()[0] / 0.01 - 100 * likeness
    assert (float(noise.mean()), float(noise.std())) == (pytest.approx(0, abs=0.1), pytest.approx(1, abs=0.1))
    tuning.finish()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight != 0, kept)

    magnitude = gossamer.tune(dense, "MaskLLM(prior=100.0)", "2:4", steps=5, targets="*.1.mlp.up_proj").finish()
    expected = tiny_llama()
    gossamer.prune(expected, "Magnitude", "2:4", targets="*.1.mlp.up_proj")
    assert torch.equal(magnitude.model.layers[1].mlp.up_proj.weight, expected.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_regulariser_is_in_the_gradient_once_a_step(family: str, passes: int) -> None:
    dry = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0} if family == "gpt2" else {}
    model = causal(family, **dry).train()
    tuning = gossamer.tune(model, "MaskLLM(regularizer=0.1)", "2:4", steps=5)
    seen: dict[Any, torch.Tensor] = {}
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.0)
    tuning.attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: seen.update({p: p.grad.clone() for p in tuning.parameters()}))

    squares = sum((w.parameter * w.stored(layer.soft())).square().sum() for w, layer in tuning._layers.items())
    task = sum(loss_of(model, seed) for seed in range(passes)) / passes
    expected = torch.autograd.grad(task - 0.1 * squares, tuning.parameters())
    for seed in range(passes):
        (loss_of(model, seed) / passes).backward()
    optimizer.step()
    for parameter, gradient in zip(tuning.parameters(), expected, strict=True):
        assert torch.allclose(seen[parameter], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_only_logits_are_trained_and_the_choice_is_learned(tiny_llama: Callable[..., Any]) -> None:
    dense = tiny_llama().train()
    model = copy.deepcopy(dense)
    tuning = gossamer.tune(model, "MaskLLM", "2:4", steps=60)
    at_first = float(loss_of(model.eval()).detach())
    model.train()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in tuning.parameters()}
    optimizer = adamw(tuning, 1e-2)
    tuning.attach(optimizer)
    train(tuning, optimizer, 60)
    finished = tuning.finish().eval()
    assert float(loss_of(finished).detach()) < at_first
    for (name, after), before in zip(
        sorted(finished.named_parameters()), [p for _, p in sorted(dense.named_parameters())], strict=True
    ):
        assert torch.equal(after, before) or torch.equal(after[after != 0], before[after != 0]), name
        assert after.requires_grad


def test_a_pruned_model_wants_a_teacher(tiny_llama: Callable[..., Any]) -> None:
    model, other = tiny_llama(), tiny_llama(hidden_size=64)
    gossamer.prune(model, "Magnitude", "2:4")
    with pytest.raises(GossamerError, match=r"q_proj.weight is pruned, .* give teacher="):
        gossamer.tune(model, "MaskLLM", "2:4", steps=1)
    with pytest.raises(GossamerError, match=r"the teacher has no model.layers.0.self_attn.q_proj.weight of shape \(32, 32\)"):
        gossamer.tune(model, "MaskLLM", "2:4", steps=1, teacher=other)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(GossamerError, match="defined for the patterns NM, not for Unstructured"):
        gossamer.tune(model, "MaskLLM", "Unstructured", sparsity=0.5, steps=1)
    with pytest.raises(GossamerError, match="temperature and scale are pairs"):
        gossamer.tune(model, "MaskLLM(temperature=4)", "2:4", steps=1)
    with pytest.raises(GossamerError, match="regularizer ≥ 0"):
        gossamer.tune(model, "MaskLLM(regularizer=-1.0)", "2:4", steps=1)
