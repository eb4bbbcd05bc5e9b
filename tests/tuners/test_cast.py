"""CAST by hand: AdamS written out, factors that fold away, and weights that shrink to zero without a mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from tests.sites.families import causal, ids
from tests.tuners.loops import adamw, loss_of, train
from tests.tuners.test_ast import BETAS, EPS, RATE, mask_of


@pytest.mark.parametrize("decay", [3e-3, None])
def test_the_step_is_adams(tiny_llama: Callable[..., Any], decay: float | None) -> None:
    model = tiny_llama().train()
    w = model.model.layers[0].mlp.up_proj.weight
    steps = 8
    tuning = gossamer.tune(model, f"CAST(decay={decay}, every=2)", "2:4", steps=steps)
    optimizer = adamw(tuning, RATE)
    tuning.attach(optimizer)

    hand, mask = w.detach().clone(), mask_of(w.detach())
    m, v = torch.zeros_like(hand), torch.zeros_like(hand)
    for t in range(1, steps + 1):
        loss_of(model, t).backward()
        g = w.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        alpha = (t - 1) / steps
        scale = (v[mask].mean() / (1 - BETAS[1] ** max(t - 1, 1))).sqrt() if decay is None else decay
        u = torch.where(mask, m, (1 - alpha) * m + alpha * scale * hand.sign())
        v = BETAS[1] * v + (1 - BETAS[1]) * u**2
        seen = v if t > 1 else (1 - BETAS[1]) * g**2  # the first step is Adam's own
        hand -= RATE * (u / (1 - BETAS[0] ** t)) / ((seen / (1 - BETAS[1] ** t)).sqrt() + EPS)
        assert torch.allclose(w, hand, rtol=1e-4, atol=2e-6), t
        assert torch.allclose(optimizer.state[w]["exp_avg"], m, rtol=1e-4, atol=1e-7)
        if t % 2 == 0:
            mask = mask_of(w.detach())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_forward_pass_is_dense_and_factors_fold(family: str) -> None:
    model = causal(family)
    expected = model(ids()).logits
    tuning = gossamer.tune(model, "CAST(scales=4)", "2:4", steps=4)
    assert torch.equal(model(ids()).logits, expected)  # factors of one, no mask
    for weight, layer in tuning._layers.items():
        with torch.no_grad():
            layer.scale.uniform_(0.5, 2.0)
        rows = weight.matrices(weight.parameter.detach())
        by_hand = rows * layer.scale.detach().repeat_interleave(rows.shape[-1] // 4, -1)
        assert torch.equal(weight.matrices(layer(weight.parameter)).detach(), by_hand)
    finals = {weight.name: layer.folded(weight.parameter).detach() for weight, layer in tuning._layers.items()}
    tuning.finish()
    assert all(torch.equal(dict(model.named_parameters())[name], final) for name, final in finals.items())


def test_weights_outside_the_mask_shrink_to_zero(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(initializer_range=0.02).train()
    tuning = gossamer.tune(model, "CAST", "2:4", steps=150)
    optimizer = adamw(tuning, 1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / 150)
    tuning.attach(optimizer)
    outside = {w: w.parameter.detach()[~layer.mask].abs().mean() for w, layer in tuning._layers.items()}
    for _ in range(150):
        train(tuning, optimizer, 1)
        rate.step()
    for weight, layer in tuning._layers.items():
        assert weight.parameter.detach()[~layer.mask].abs().median() < 0.01 * outside[weight]
    before = float(loss_of(model).detach())
    assert float(loss_of(tuning.finish()).detach()) == pytest.approx(before, rel=0.05)  # the last mask takes little


def test_what_scales_do_not_divide_is_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(GossamerError, match=r"q_proj.weight: 3 scales a row do not divide its 32 columns"):
        gossamer.tune(tiny_llama(), "CAST(scales=3)", "2:4", steps=1)
    with pytest.raises(GossamerError, match="CAST wants"):
        gossamer.tune(tiny_llama(), "CAST(scales=0)", "2:4", steps=1)
