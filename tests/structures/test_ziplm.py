"""ZipLM, from its definition: orders and errors on the dense model, numbers by one budget, weights fitted to what comes in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.levels import within
from gossamer.core.surgeon import refit, remove
from tests.sites.families import causal, ids


def inputs(model: Any, modules: list[Any]) -> list[torch.Tensor]:
    """Return what comes to each module, (tokens, in), float64."""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _m, args, i=i: found.update({i: args[0].flatten(0, -2).double()}))
        for i, m in enumerate(modules)
    ]
    with torch.no_grad():
        model(ids())
    for hook in hooks:
        hook.remove()
    return [found[i] for i in range(len(modules))]


def hessian(x: torch.Tensor, damp: float) -> torch.Tensor:
    h = x.T @ x
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def readers(model: Any) -> list[Any]:
    blocks = model.model.layers
    return [*(block.self_attn.o_proj for block in blocks), *(block.mlp.down_proj for block in blocks)]


def test_the_whole_of_it_by_another_road(tiny_llama: Callable[..., Any]) -> None:
    damp, width = 0.05, [16, 16, 1, 1]
    model, whole = tiny_llama(), tiny_llama()
    report = gossamer.shrink(model, f"ZipLM(damp={damp})", sparsity=0.4, data=ids())

    made = readers(whole)
    removals, costs, sizes, levels = [], [], [], []
    for module, x, n in zip(made, inputs(whole, made), width, strict=True):
        w, h = module.weight.detach().double(), hessian(x, damp)
        groups = w.shape[1] // n
        removal, _, _ = remove(w, torch.linalg.inv(h), n, groups - 1)
        own = [k for k in range(groups) if (groups - k) % (8 if n == 1 else 1) == 0]
        levels.append(own)
        removals.append(removal)
        costs.append([float(removal.errors[k] / torch.trace(w @ h @ w.T)) for k in own])
        # a head group: 16 rows of q, 8 of k and of v, 16 columns of o, 32 long each; a channel: three vectors of 32
        sizes.append([(groups - k) * (48 * 32 if n > 1 else 96) for k in own])
    inside = sum(p.numel() for p in whole.model.layers.parameters())
    picked = within(costs, sizes, sum(s[0] for s in sizes) - 0.4 * inside)
    left = [w // n - own[level] for w, n, own, level in zip((32, 32, 64, 64), width, levels, picked, strict=True)]
    assert [r.get("heads", [2, 2])[1] for r in report.blocks] == left[:2]
    assert [r.get("channels", [64, 64])[1] for r in report.blocks] == left[2:]

    for at in (0, 2, 1, 3):  # attention and MLP of the first block, then of the second: each sees what was done before it
        module, n, removal = made[at], width[at], removals[at]
        gone = levels[at][picked[at]]
        h = hessian(inputs(whole, made)[at], damp)
        groups = module.weight.shape[1] // n
        kept = (removal.kept(gone, groups)[:, None] * n + torch.arange(n)).flatten()
        module.weight.data = refit(module.weight.detach().double(), h, kept).float()
        found = readers(model)[at].weight
        torch.testing.assert_close(found, module.weight[:, kept], rtol=2e-3, atol=2e-4)


def test_it_is_better_than_dropping_the_same_number_at_random(tiny_llama: Callable[..., Any]) -> None:
    model, whole = tiny_llama(), tiny_llama()
    report = gossamer.shrink(model, "ZipLM", sparsity=0.3, data=ids())
    lost = tiny_llama()
    for block, row in zip(lost.model.layers, report.blocks, strict=True):
        for module, kind in ((block.self_attn.o_proj, "heads"), (block.mlp.down_proj, "channels")):
            was, now = row.get(kind, [1, 1])
            wide = module.weight.shape[1] // was
            module.weight.data[:, : (was - now) * wide] = 0
    with torch.no_grad():
        wanted = whole(ids()).logits
        assert (model(ids()).logits - wanted).norm() < 0.8 * (lost(ids()).logits - wanted).norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "qwen3"])
def test_families(family: str) -> None:
    model = causal(family)
    report = gossamer.shrink(model, "ZipLM", sparsity=0.3, data=ids())
    assert 0.3 <= report.structure["sparsity"] < 0.36
    assert model(ids()).logits.isfinite().all()


def test_what_it_cannot_do_is_said_before_it_starts(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(gossamer.GossamerError, match=r"ZipLM.* ends at 0\.\d+ of the parameters in the blocks removed; 0.95"):
        gossamer.shrink(model, "ZipLM", sparsity=0.95, data=ids())
    with pytest.raises(gossamer.GossamerError, match="one MLP whose channels can be removed"):
        gossamer.shrink(causal("mixtral"), "ZipLM", sparsity=0.2, data=ids())
    with pytest.raises(gossamer.GossamerError, match="ZipLM wants damp > 0"):
        gossamer.shrink(model, "ZipLM(damp=0.0)", sparsity=0.2, data=ids())


@pytest.mark.parametrize("method", ["ZipLM(multiple=1)", "Tyr(rounds=1, generations=1, multiple=1)"])
def test_channels_that_never_fire_go_first(method: str) -> None:
    model = causal("opt")
    for block in model.model.decoder.layers:
        block.fc1.bias.data[:32] = -100.0
    with torch.no_grad():
        before = model(ids()).logits
        report = gossamer.shrink(model, method, sparsity=0.2, data=ids())
        after = model(ids()).logits
    if method.startswith("ZipLM"):
        assert all(block["channels"][1] <= 36 and "heads" not in block for block in report.blocks or [])
        assert float((after - before).norm() / before.norm()) < 1e-4
    else:  # which gives each layer its share first
        assert float((after - before).norm() / before.norm()) < 0.3


def test_a_layer_that_puts_nothing_out_costs_nothing() -> None:
    model = causal("llama")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        before = model(ids()).logits
        report = gossamer.shrink(model, "ZipLM", sparsity=0.2, data=ids())
        after = model(ids()).logits
    assert report.blocks is not None
    assert report.blocks[1]["channels"][1] == 8
    assert float((after - before).norm() / before.norm()) < 0.2
