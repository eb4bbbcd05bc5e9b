"""Týr, from its definition: one round against every allocation there is, and a KL that is worked out in another way."""

import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import gossamer
from gossamer.core.evolution import swapped
from gossamer.core.surgeon import refit, remove
from gossamer.core.variants import Variants
from gossamer.sites._divergence import Moved
from gossamer.structures import Tyr
from tests.sites.families import causal, ids
from tests.structures.methods import group_of
from tests.structures.test_ziplm import hessian, inputs, readers

ALL: dict[str, Any] = {"tokens": (64,), "survivors": (1,)}  # the windows of ids() have 64 tokens


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found.double()


def apart(now: torch.Tensor, then: torch.Tensor) -> float:
    """Return the mean KL(then‖now) a token."""
    p, q = (x.flatten(0, 1).log_softmax(-1) for x in (then, now))
    return float(kl_div(q, p, log_target=True, reduction="batchmean"))


def put(model: Any, variants: list[torch.Tensor]) -> None:
    for module, w in zip(readers(model), variants, strict=True):
        module.weight.data = w.float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_measure_is_kl_from_what_the_model_said(family: str) -> None:
    model = causal(family)
    then, measure = logits(model), Moved(model, [{"input_ids": part} for part in ids().split(2)])
    assert measure(0, 64) == pytest.approx(0, abs=1e-6)
    for parameter in model.transformer.h.parameters() if hasattr(model, "transformer") else model.model.layers.parameters():
        parameter.data *= 8
    assert measure(0, 64) == pytest.approx(apart(logits(model), then), rel=1e-3)
    assert measure(0, 10**6) == measure(0, 64)
    order = list(range(4))
    random.Random(7).shuffle(order)
    now = logits(model)
    whole, part = apart(now[order[:1]], then[order[:1]]), apart(now[order[1:2], :5], then[order[1:2], :5])
    assert measure(7, 21) == pytest.approx((16 * whole + 5 * part) / 21, rel=1e-3)  # one window, and five tokens of the next


def test_one_round_finds_the_best_of_all_allocations(tiny_llama: Callable[..., Any]) -> None:
    model, whole = tiny_llama(), tiny_llama()
    how = Tyr(rounds=1, levels=2, generations=12, damp=0.05, **ALL)
    report = gossamer.shrink(model, how, sparsity=0.3, data=ids())

    then, width, count = logits(whole), [16, 16, 1, 1], [2, 2, 64, 64]
    dense = [module.weight.detach().double() for module in readers(whole)]
    inside = sum(p.numel() for p in whole.model.layers.parameters())
    head, channel = 48 * 32, 96  # parameters: 16 rows of q, 8 of k and of v, 16 columns of o; three vectors of 32
    share = 1 - 0.3 * inside / (4 * head + 128 * channel)
    base = [1 if round(share * 4) < 4 else 2, round(share * 4) - 1]  # of four head groups, the first ones keep more
    base = sorted((base[0], round(share * 4) - base[0]), reverse=True)
    left = share * (4 * head + 128 * channel) - sum(base) * head
    even = round(left / channel / 8)  # eights of channels, in both blocks
    base += [(even - even // 2) * 8, even // 2 * 8]
    choices = [[n for n in range(1, 3) if abs(n - base[i]) <= 2] for i in (0, 1)]
    choices += [[n for n in range(8, 65, 8) if abs(n - base[i]) <= 16] for i in (2, 3)]

    made: dict[int, dict[int, torch.Tensor]] = {}
    for at in (0, 2, 1, 3):  # in the order in which the model comes to them; each sees the base before it
        h = hessian(inputs(whole, readers(whole))[at], 0.05)
        removal, _, _ = remove(dense[at], torch.linalg.inv(h), width[at], count[at] - 1)
        made[at] = {}
        for n in choices[at]:
            members = removal.kept(count[at] - n, count[at])
            columns = (members[:, None] * width[at] + torch.arange(width[at])).flatten()
            made[at][n] = refit(dense[at], h, columns) if n < count[at] else dense[at]
        readers(whole)[at].weight.data = made[at][base[at]].float()
    found = {}
    for picked in itertools.product(*choices):
        if picked[0] + picked[1] == sum(base[:2]) and picked[2] + picked[3] == sum(base[2:]):
            put(whole, [made[at][n] for at, n in enumerate(picked)])
            found[picked] = apart(logits(whole), then)
    assert len(found) >= 5
    best = min(found, key=found.__getitem__)
    assert [r.get("heads", [2, 2])[1] for r in report.blocks] + [r.get("channels", [64, 64])[1] for r in report.blocks] == [
        *best
    ]
    assert report.blocks[0]["divergence"] == pytest.approx(found[best], rel=1e-2)
    for module, n, variant in zip(readers(model), best, (made[at][n] for at, n in enumerate(best)), strict=True):
        columns = variant[:, variant.abs().sum(0) > 0]
        assert module.weight.shape == columns.shape, n
        torch.testing.assert_close(module.weight.double(), columns, rtol=5e-3, atol=5e-4)


def test_swaps_keep_the_total_of_a_kind_and_stay_on_the_grid() -> None:
    alike = ["heads", "heads", "channels", "channels", "channels"]
    choices = [[1, 2, 3], [1, 2, 3], [8, 16, 24], [16, 24, 32], [8, 16, 24, 32]]
    chance, parent, seen = random.Random(0), [2, 2, 16, 24, 16], set()
    for _ in range(500):
        child = swapped(alike, choices, parent, chance)
        assert sum(child[:2]) == 4
        assert sum(child[2:]) == 56
        assert all(n in own for n, own in zip(child, choices, strict=True))
        seen.add(tuple(child))
    assert (1, 3, 16, 24, 16) in seen  # a level each way, and several swaps at once
    assert any(child[2] == 24 and child[0] == 3 for child in seen)


def test_a_better_parent_is_not_given_up(tiny_llama: Callable[..., Any]) -> None:
    """On the same tokens in every generation, KL never rises; more generations never make it worse."""
    told = []
    for generations in (1, 3, 6):
        how = Tyr(rounds=1, generations=generations, offspring=4, **ALL)
        report = gossamer.shrink(tiny_llama(num_hidden_layers=3), how, sparsity=0.3, data=ids())
        told.append(report.blocks[0]["divergence"])
    assert told[0] >= told[1] - 1e-7 >= told[2] - 2e-7


def test_intervals_are_halved_down_to_a_member() -> None:
    channels, heads = group_of(torch.zeros(2, 128)), group_of(torch.zeros(2, 64), count=8, kind="heads")
    for at, apart in ((0, 32), (1, 16), (2, 8), (5, 8)):  # of 128, and a multiple of 8 at least
        assert Tyr(interval=0.25, levels=1)._choices(channels, 64, at) == [64 - apart, 64, 64 + apart]
    assert Tyr(interval=0.25, levels=4)._choices(heads, 5, 0) == [1, 3, 5, 7]
    assert Tyr(interval=0.25, levels=2)._choices(heads, 7, 3) == [5, 6, 7, 8]


def test_variants_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Variants() as variants:
        variants.put("a", 1, torch.eye(3))
        variants.put("a", 1, torch.full((2, 2), 7.0))
        assert variants.get("a", 1).tolist() == [[7.0, 7.0], [7.0, 7.0]]
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "qwen3"])
def test_families(family: str) -> None:
    model, again = causal(family), causal(family)
    how = Tyr(rounds=2, generations=2, offspring=4, tokens=(16, 64))
    report = gossamer.shrink(model, how, sparsity=0.3, data=ids())
    assert report.structure["sparsity"] == pytest.approx(0.3, abs=0.06)
    assert model(ids()).logits.isfinite().all()
    gossamer.shrink(again, how, sparsity=0.3, data=ids())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_it_cannot_do_is_said_before_it_starts(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(gossamer.GossamerError, match="parameters in channels at most"):
        gossamer.shrink(model, "Tyr", sparsity=0.95, data=ids())
    with pytest.raises(gossamer.GossamerError, match=r"can remove less than 0\.99\d+ of the parameters"):
        gossamer.shrink(model, "Tyr", sparsity=0.999, data=ids())
    with pytest.raises(gossamer.GossamerError, match="one MLP whose channels can be removed"):
        gossamer.shrink(causal("mixtral"), "Tyr", sparsity=0.2, data=ids())
    with pytest.raises(gossamer.GossamerError, match="survivors as many as tokens, the last of them 1"):
        gossamer.shrink(model, "Tyr(survivors=(4, 2))", sparsity=0.2, data=ids())
    with pytest.raises(gossamer.GossamerError, match="so each mapping needs input_ids"):
        gossamer.shrink(model, "Tyr", sparsity=0.2, data=[{"inputs_embeds": torch.zeros(1, 4, 32)}])
    assert model.model.layers[0].mlp.up_proj.out_features == 64
