"""Adapt-Pruner, from its definition: the fractions by hand, the scores from autograd, the rounds one after the other."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.structures import AdaptPruner
from gossamer.structures.adaptpruner import scaled, taylor
from tests.sites.families import causal, ids
from tests.structures.methods import group_of
from tests.structures.test_depth import states


def test_importance_is_centred_and_scaled() -> None:
    assert scaled([0.1, 0.2, 0.6]) == pytest.approx([-2 / 3, -1 / 3, 1.0])  # the mean is 0.3
    assert scaled([0.7, 0.4, 0.4]) == pytest.approx([1.0, -0.5, -0.5])
    assert scaled([0.3]) == [0.0]  # no deviation to divide by


def test_the_score_is_the_sum_over_all_of_a_members_weights() -> None:
    out, into = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 5.0]])
    slopes = group_of(torch.tensor([[0.5, -1.0], [-1.0, 0.0]]), torch.tensor([[1.0, 9.0, -3.0], [2.0, -2.0, 0.0]]))
    # member 0: |0.5| + |-3| of out, |2| + 0 + |-3| of into; member 1: |2| + 0, |-2| + |-2| + 0
    assert taylor(group_of(out, into), slopes).tolist() == [8.5, 6.0]


def test_a_head_is_all_of_its_columns() -> None:
    out = torch.arange(8.0).reshape(1, 8)
    group, slopes = (group_of(w, torch.zeros(2, 3), count=2, kind="heads") for w in (out, -torch.ones(1, 8)))
    assert taylor(group, slopes).tolist() == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7]


def salience(block: nn.Module, kind: str, head: int) -> torch.Tensor:
    """Return Σ|w·∂L/∂w| of each channel, or each key-value head with its two query heads, member by member."""
    parts: Any = block
    if kind == "channels":
        mlp = parts.mlp
        rows = [(mlp.gate_proj, 1), (mlp.up_proj, 1)]
        reads, wide = mlp.down_proj, 1
    else:
        attention = parts.self_attn
        rows = [(attention.q_proj, 2 * head), (attention.k_proj, head), (attention.v_proj, head)]
        reads, wide = attention.o_proj, 2 * head
    found = []
    for member in range(reads.weight.shape[1] // wide):
        pieces = [(m.weight * m.weight.grad)[member * n : (member + 1) * n] for m, n in rows]
        pieces.append((reads.weight * reads.weight.grad)[:, member * wide : (member + 1) * wide])
        found.append(sum(float(piece.detach().abs().sum()) for piece in pieces))
    return torch.tensor(found)


def test_rounds_by_hand(tiny_llama: Callable[..., Any]) -> None:
    """Three rounds of 0.1: what goes in each follows from the model that the last one left."""
    sizes = {"num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    model, whole = tiny_llama(**sizes), tiny_llama(**sizes)
    report = gossamer.shrink(model, "AdaptPruner(amplitude=0.1, step=0.1, multiple=1)", sparsity=0.3, data=ids())

    head, channel = 4, 3 * 32  # hidden 32 over 8 heads; a channel has three vectors of 32
    group = (2 * head + head + head + 2 * head) * 32  # of q, k, v and o
    inside = sum(p.numel() for p in whole.model.layers.parameters())
    s, before = [0.0, 0.0, 0.0], [(0, 0)] * 3
    for place in (1, 2, 3):
        x = states(whole, ids())
        cosines = [torch.cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in itertools.pairwise(x)]
        deviation = [float(sum(cosines) / 3 - c) for c in cosines]  # 1 − cos less its mean
        important = [d / max(abs(e) for e in deviation) for d in deviation]

        def gone(fractions: list[float], before: list[tuple[int, int]] = before) -> list[tuple[int, int]]:
            now = [(int(f * 4 + 1e-9), int(f * 96 + 1e-9)) for f in fractions]
            return [(max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(before, now, strict=True)]  # nothing comes back

        def moved(delta: float, s: list[float] = s, important: list[float] = important) -> list[float]:
            return [min(max(one + delta - 0.1 * i, 0.0), 0.99) for one, i in zip(s, important, strict=True)]

        tried = [moved(k / 20_000) for k in range(20_000)]  # every Δ on a fine grid
        s = min(tried, key=lambda f: abs(sum(h * group + c * channel for h, c in gone(f)) - place * 0.1 * inside))
        whole.zero_grad()
        whole(ids(), labels=ids()).loss.backward()
        for block, (heads, channels) in zip(whole.model.layers, gone(s), strict=True):
            attention, mlp = block.self_attn, block.mlp
            best = salience(block, "channels", head).topk(96 - channels).indices.sort().values
            mlp.gate_proj.weight, mlp.up_proj.weight = (
                nn.Parameter(m.weight.detach()[best]) for m in (mlp.gate_proj, mlp.up_proj)
            )
            mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, best])
            kept = salience(block, "heads", head).topk(4 - heads).indices.sort().values
            for linear, n in ((attention.q_proj, 8), (attention.k_proj, 4), (attention.v_proj, 4)):
                rows = (kept[:, None] * n + torch.arange(n)).flatten()
                linear.weight = nn.Parameter(linear.weight.detach()[rows])
            columns = (kept[:, None] * 8 + torch.arange(8)).flatten()
            attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach()[:, columns])
        before = gone(s)
    assert [row["fraction"] for row in report.blocks] == pytest.approx(s, abs=1e-3)
    assert len(set(s)) == 3
    assert [row["channels"] for row in report.blocks] == [[96, 96 - channels] for _, channels in before]  # of the first round
    for ours, theirs in zip(model.model.layers, whole.model.layers, strict=True):
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(a, b), name
    assert report.structure["sparsity"] == pytest.approx(0.3, abs=group / inside)


def test_the_total_is_kept_where_blocks_are_full(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=3, intermediate_size=256)
    report = gossamer.shrink(model, "AdaptPruner(amplitude=0.5, step=0.2)", sparsity=0.6, data=ids())
    assert report.structure["sparsity"] == pytest.approx(0.6, abs=0.04)
    assert all(0 <= row["fraction"] <= 0.99 and -1 <= row["importance"] <= 1 for row in report.blocks)
    assert max(abs(row["importance"]) for row in report.blocks) == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "qwen3"])
def test_families(family: str) -> None:
    model = causal(family)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    report = gossamer.shrink(model, "AdaptPruner(step=0.1)", sparsity=0.3, data=ids())
    assert report.structure["sparsity"] == pytest.approx(0.3, abs=0.06)
    assert model(ids()).logits.isfinite().all()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


def test_what_it_cannot_do_is_said_before_it_starts(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(gossamer.GossamerError, match=r"can remove at most 0\.\d+ of the parameters in the blocks; 0.95"):
        gossamer.shrink(model, "AdaptPruner", sparsity=0.95, data=ids())
    with pytest.raises(gossamer.GossamerError, match="one MLP whose channels can be removed"):
        gossamer.shrink(causal("mixtral"), "AdaptPruner", sparsity=0.2, data=ids())
    with pytest.raises(gossamer.GossamerError, match="AdaptPruner wants amplitude >= 0"):
        gossamer.shrink(model, AdaptPruner.__name__ + "(step=0.0)", sparsity=0.2, data=ids())
    with pytest.raises(gossamer.GossamerError, match="so each mapping needs input_ids"):
        gossamer.shrink(model, "AdaptPruner", sparsity=0.2, data=[{"inputs_embeds": torch.zeros(1, 4, 32)}])
    assert model.model.layers[0].mlp.up_proj.out_features == 64
