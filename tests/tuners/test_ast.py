"""AST by hand: the gradient straight through, and its step against an AdamW that is written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.core.errors import GossamerError
from tests.tuners.loops import adamw, loss_of, train

BETAS, EPS, RATE = (0.9, 0.999), 1e-8, 1e-3


def mask_of(w: Tensor) -> Tensor:
    """Two of four by brute force."""
    groups = w.abs().unflatten(-1, (-1, 4))
    return torch.zeros_like(groups).scatter_(-1, groups.topk(2, -1).indices, 1).flatten(-2).bool()


def test_the_gradient_goes_straight_through(tiny_llama: Callable[..., Any]) -> None:
    model, masked = tiny_llama(), tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    gossamer.tune(model, "AST", "2:4", steps=1)
    for layer in masked.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data *= mask_of(module.weight.data)
    loss_of(model).backward()
    loss_of(masked).backward()
    assert torch.equal(weight.grad, masked.model.layers[0].mlp.up_proj.weight.grad)  # that of W ⊙ M, pruned entries too
    assert int((weight.grad[~mask_of(weight)] != 0).sum()) > 0.9 * weight.numel() / 2


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_is_adamw_with_the_decay_in_its_numerator(tiny_llama: Callable[..., Any], fused: bool) -> None:
    model = tiny_llama().train()
    w = model.model.layers[0].mlp.up_proj.weight
    decay, steps, ramp = 0.3, 8, 0.5
    tuning = gossamer.tune(model, f"AST(decay={decay}, ramp={ramp}, every=2)", "2:4", steps=steps)
    optimizer = adamw(tuning, RATE, weight_decay=0.1, fused=fused)
    tuning.attach(optimizer)

    hand, mask = w.detach().clone(), mask_of(w.detach())
    m, v = torch.zeros_like(hand), torch.zeros_like(hand)
    for t in range(1, steps + 1):
        loss_of(model, t).backward()
        g = w.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        annealed = min((t - 1) / (ramp * steps), 1.0) * decay
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        u = m + annealed * hand * ~mask
        v = BETAS[1] * v + (1 - BETAS[1]) * u**2
        seen = v if t > 1 else (1 - BETAS[1]) * g**2  # the first step is Adam's own
        hand *= 1 - RATE * 0.1
        hand -= RATE * (u / (1 - BETAS[0] ** t)) / ((seen / (1 - BETAS[1] ** t)).sqrt() + EPS)
        assert torch.allclose(w, hand, rtol=1e-4, atol=2e-6), t
        assert torch.allclose(optimizer.state[w]["exp_avg"], m, rtol=1e-4, atol=1e-7)
        assert torch.allclose(optimizer.state[w]["exp_avg_sq"], v, rtol=1e-3, atol=1e-9)
        if t % 2 == 0:
            mask = mask_of(w.detach())


def test_pruned_entries_come_back_and_decay_holds_them_down(tiny_llama: Callable[..., Any]) -> None:
    left = {}
    for decay in (0.0, 10.0):
        model = tiny_llama().train()
        gossamer.prune(model, "Magnitude", "2:4")
        weight = model.model.layers[0].mlp.up_proj.weight
        was = weight.detach() != 0
        tuning = gossamer.tune(model, f"AST(decay={decay}, ramp=0.0, every=1)", "2:4", steps=40)
        optimizer = adamw(tuning, 3e-3)
        tuning.attach(optimizer)
        train(tuning, optimizer, 40)
        layer = tuning._layers[next(w for w in tuning._layers if w.parameter is weight)]
        left[decay] = float(weight.detach()[~layer.mask].abs().mean())
        tuning.finish()
        if decay == 0:
            assert int(((weight != 0) & ~was).sum()) > 10
    assert left[10.0] < 0.7 * left[0.0]


def test_hyperparameters_are_checked() -> None:
    for wrong in ("decay=-1.0", "ramp=1.5", "every=0"):
        with pytest.raises(GossamerError, match="AST wants"):
            gossamer.tune(torch.nn.Linear(4, 4), f"AST({wrong})", "2:4", steps=1)
