"""Depth, from its papers' definitions: the angle over n blocks at the last token, and the influence of one over all tokens."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gossamer
from tests.sites.families import ids


def states(model: Any, batch: torch.Tensor) -> list[torch.Tensor]:
    """Return x_0 … x_L before the last norm, (windows, tokens, hidden) each, taken by hooks on the blocks."""
    found: list[torch.Tensor] = []
    blocks = model.model.layers
    hooks = [blocks[0].register_forward_pre_hook(lambda m, args: found.append(args[0]))]
    hooks += [block.register_forward_hook(lambda m, args, out: found.append(out)) for block in blocks]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


def angles(model: Any, batch: torch.Tensor, n: int) -> list[float]:
    x = states(model, batch)
    found = []
    for at in range(len(x) - n):
        total = 0.0
        for a, b in zip(x[at][:, -1], x[at + n][:, -1], strict=True):
            dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
            total += math.acos(dot / math.sqrt(float((a.double() ** 2).sum()) * float((b.double() ** 2).sum()))) / math.pi
        found.append(total / len(batch))
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_run_of_blocks_with_the_least_angle_goes(n: int, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=5)
    before = [block.self_attn.q_proj.weight.clone() for block in model.model.layers]
    wanted = angles(model, ids(), n)
    first = wanted.index(min(wanted))
    report = gossamer.shrink(model, "Depth", sparsity=n / 5, data=ids())
    assert [row["distance"] for row in report.blocks[: len(wanted)]] == pytest.approx(wanted, abs=1e-5)
    assert [row["block"] for row in report.blocks if row.get("dropped")] == list(range(first, first + n))
    left = [i for i in range(5) if not first <= i < first + n]
    assert len(model.model.layers) == model.config.num_hidden_layers == 5 - n
    for block, index in zip(model.model.layers, left, strict=True):
        assert torch.equal(block.self_attn.q_proj.weight, before[index])


def test_block_influence_is_over_all_tokens(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=4)
    x = states(model, ids())
    wanted = []
    for a, b in itertools.pairwise(x):
        cosines = [float(p @ q / p.norm() / q.norm()) for p, q in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)]
        wanted.append(1 - sum(cosines) / len(cosines))
    report = gossamer.shrink(model, "Depth(consecutive=False)", sparsity=0.5, data=ids())
    assert [row["distance"] for row in report.blocks] == pytest.approx(wanted, abs=1e-5)
    assert {row["block"] for row in report.blocks if row.get("dropped")} == set(sorted(range(4), key=wanted.__getitem__)[:2])


def test_a_model_without_the_dropped_blocks_is_what_skipping_them_gives(tiny_llama: Callable[..., Any]) -> None:
    model, whole = tiny_llama(num_hidden_layers=4), tiny_llama(num_hidden_layers=4)
    report = gossamer.shrink(model, "Depth", sparsity=0.5, data=ids())
    gone = [row["block"] for row in report.blocks if row.get("dropped")]
    for index in gone:
        whole.model.layers[index].forward = lambda hidden_states, **_: hidden_states
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, whole(ids()).logits)


@pytest.mark.parametrize("sparsity", [0.1, 0.95])
def test_less_than_a_block_or_all_of_them_is_refused(sparsity: float, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=4)
    with pytest.raises(gossamer.GossamerError, match=r"of 4, a sparsity of .* is [04]; give from 0.250 to 0.750"):
        gossamer.shrink(model, "Depth", sparsity=sparsity, data=ids())
    assert len(model.model.layers) == 4
