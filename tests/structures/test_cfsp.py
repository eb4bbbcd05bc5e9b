"""CFSP, entry by entry from its definition."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.stats import Stats
from gossamer.structures import CFSP
from gossamer.structures.cfsp import _fractions
from tests.sites.families import ids
from tests.structures.methods import group_of
from tests.structures.test_depth import states

DOWN = torch.tensor([[1.0, -2.0, 1.0], [3.0, 0.0, 1.0]])  # (out, channels)
UP = torch.tensor([[1.0, 1.0], [-2.0, 0.0], [1.0, 3.0]])  # (channels, in)
GATE = torch.tensor([[4.0, 1.0], [0.0, 1.0], [0.0, 2.0]])


def seen() -> Stats:
    stats = Stats(3)
    stats.add(torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]]))  # norms 5, 2, 1
    return stats


def test_the_score_is_the_papers_by_hand() -> None:
    # |W_down|·‖x‖ = [[5, 4, 1], [15, 0, 1]], shares of its rows; of up's and gate's columns; each averaged over two entries.
    down = [(5 / 10 + 15 / 16) / 2, (4 / 10 + 0) / 2, (1 / 10 + 1 / 16) / 2]
    up = [(1 / 4 + 1 / 4) / 2, (2 / 4 + 0) / 2, (1 / 4 + 3 / 4) / 2]
    gate = [(4 / 4 + 1 / 4) / 2, (0 + 1 / 4) / 2, (0 + 2 / 4) / 2]
    wanted = [(d + u + g) * n for d, u, g, n in zip(down, up, gate, (5, 2, 1), strict=True)]
    assert CFSP().score(group_of(DOWN, UP, GATE), seen()).tolist() == pytest.approx(wanted, rel=1e-6)


def test_shares_of_a_channels_own_entries_rank_by_the_norm_alone() -> None:
    score = CFSP(share="entries", c=2.0).score(group_of(DOWN, UP, GATE), seen())
    assert score.tolist() == pytest.approx([1.5 * n**2 for n in (5, 2, 1)], rel=1e-6)  # 1/2 from each matrix of two entries


def test_a_blocks_share_follows_its_angle(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=3, intermediate_size=256)
    x = states(model, ids())
    theta = [
        float(torch.arccos(torch.cosine_similarity(a.double(), b.double(), dim=-1)).mean()) / math.pi
        for a, b in itertools.pairwise(x)
    ]
    mean = sum(theta) / 3
    earned = [1 / (1 + math.exp(-5 * (t - mean))) for t in theta]
    report = gossamer.shrink(model, "CFSP(a=5.0, multiple=1)", sparsity=0.4, data=ids())
    assert [row["angle"] for row in report.blocks] == pytest.approx(theta, abs=1e-6)
    kept = [row["channels"][1] for row in report.blocks]
    density = sum(kept) / (3 * 256)
    assert len(set(kept)) == 3
    for n, e in zip(kept, earned, strict=True):
        assert n == pytest.approx(256 * density * e / (sum(earned) / 3), abs=1.0)
    assert report.structure["sparsity"] == pytest.approx(0.4, abs=96 / report.structure["inside"][0])  # a channel has 96


def test_no_block_is_asked_for_more_than_it_has() -> None:
    found = _fractions([0.9, 0.1, 0.5], 0.8)
    assert max(found) == pytest.approx(1.0)
    assert sum(found) / 3 == pytest.approx(0.8)
    assert found[0] > found[2] > found[1]


def test_the_channels_that_stay_are_the_best_ones_in_their_order(tiny_llama: Callable[..., Any]) -> None:
    model, whole = tiny_llama(), tiny_llama()
    seen: list[torch.Tensor] = []
    hook = whole.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        whole(ids())
    hook.remove()
    gossamer.shrink(model, "CFSP(share='entries')", sparsity=0.3, data=ids())
    down = model.model.layers[0].mlp.down_proj
    best = seen[0].flatten(0, 1).norm(dim=0).topk(down.in_features).indices.sort().values
    assert torch.equal(down.weight, whole.model.layers[0].mlp.down_proj.weight[:, best])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight[best])


def test_more_than_the_mlps_hold_is_refused_before_anything_is_changed(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(gossamer.GossamerError, match="parameters in channels at most 10,752 can go"):
        gossamer.shrink(model, "CFSP", sparsity=0.9, data=ids())
    assert model.model.layers[0].mlp.up_proj.out_features == 64
    with pytest.raises(gossamer.GossamerError, match="CFSP wants multiple >= 1"):
        gossamer.shrink(model, "CFSP(multiple=0)", sparsity=0.2, data=ids())
