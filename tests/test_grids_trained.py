"""Both stages of GQSA: gradients through the rounding by hand, blocks refit on their grids, grids trained end to end."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.core.grid import fitted, found, moved, rounded, tiles
from gossamer.sites._walk import targets
from tests.sites.families import causal, ids
from tests.tuners.loops import adamw, loss_of, train

FAST = {"epochs": 4, "batch": 4, "rate": 2e-3, "bits": 4, "group": 16}


def pair(name: str = "llama", method: str = "GQSA", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a model with half of its groups, and the dense one; weights large enough that blocks do something."""
    model = causal(name)
    for target in targets(model):
        target.parameter.mul_(5)
    dense = copy.deepcopy(model.to(dtype))
    gossamer.prune(model, method, "1x16", sparsity=0.5, data=ids())
    return model, dense


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {target.name: target.kept(16) for target in targets(model)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def on_grids(model: nn.Module, bits: int = 4) -> bool:
    return all(bool(found(tiles(t.matrices(), 1, 16).flatten(0, 2), bits)[3].all()) for t in targets(model))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(model: Any, dense: Any) -> float:
    new = ids(4, seed=7)
    with torch.no_grad():
        return float((model(new).logits.float() - dense(new).logits.float()).square().mean())


def test_gradients_go_straight_through_by_hand() -> None:
    # s = 0.5, z = 3 of 2 bits: the grid −1.5 ... 0. w = −0.6 → q = 3 − 1 = 2, inside; w = 1 → q = 3, cut off at the top.
    w = torch.tensor([-0.6, 1.0], requires_grad=True)
    s, z = torch.tensor([0.5], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    y = rounded(w, s, z, 2)
    assert y.tolist() == [-0.5, 0.0]
    for above, by_w, by_s, by_z in (([1.0, 0.0], [1.0, 0.0], 0.2, 0.0), ([0.0, 1.0], [0.0, 0.0], 0.0, -0.5)):
        # By s: q − z − w / s = −1 + 1.2 inside, q − z = 0 outside. By z: nothing inside, −s outside.
        found_w, found_s, found_z = torch.autograd.grad(y, (w, s, z), torch.tensor(above), retain_graph=True)
        assert found_w.tolist() == by_w
        assert found_s.item() == pytest.approx(by_s, abs=1e-6)
        assert found_z.item() == pytest.approx(by_z)


def test_a_grid_moves_by_factors_and_by_whole_numbers() -> None:
    grown, shifted = torch.tensor([0.1], requires_grad=True), torch.tensor([0.05], requires_grad=True)
    scale, zero = moved(torch.tensor([0.5]), torch.tensor([7.0]), grown, shifted, 4, torch.float32)
    assert scale.item() == float(torch.tensor(0.5 * 1.1051709).bfloat16())
    assert zero.item() == 8.0  # 7 + 15 · 0.05 = 7.75
    by_grown, by_shifted = torch.autograd.grad(scale + zero, (grown, shifted))
    assert by_grown.item() == pytest.approx(0.5 * 1.1051709)
    assert by_shifted.item() == 15.0


@pytest.mark.parametrize("method", ["GQSA", "GQSA(bits=None)"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])  # gpt2: stored (in, out); mixtral: stacked experts
def test_blocks_get_closer_and_stay_on_grids(name: str, method: str) -> None:
    model, dense = pair(name, method)
    before = masks(model)
    report = gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    assert all(row["after"] < row["before"] for row in report.blocks)
    assert {row["raised"] for row in report.blocks} == {0}
    assert all(not (masks(model)[name] & ~mask).any() for name, mask in before.items())
    assert on_grids(model)
    assert report.recipe["method"] == "Reconstruct(epochs=4, batch=4, rate=0.002, bits=4, group=16)"
    if name != "mixtral":
        gossamer.pack(model, "Grouped", pattern="1x16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_gets_closer_than_rounding_alone_and_codes_change(dtype: torch.dtype) -> None:
    model, dense = pair(dtype=dtype)
    before, apart = state(model), distance(model, dense)
    gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    assert distance(model, dense) < 0.95 * apart
    assert on_grids(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    up = "model.layers.0.mlp.up_proj.weight"
    codes = [found(tiles(w[up], 1, 16).flatten(0, 1), 4)[0] for w in (before, state(model))]
    assert not torch.equal(*codes), "weights moved from one point of their grid to another"


def test_where_training_brings_nothing_the_weights_are_rounded_all_the_same() -> None:
    model, dense = pair(method="GQSA(bits=None)")
    expected = state(model)
    for target in targets(model):
        groups = tiles(target.matrices()[0].detach(), 1, 16)
        expected[target.name] = rounded(groups, *fitted(groups, 4, torch.float32), 4).flatten(1)
    report = gossamer.reconstruct(model, dense, data=ids(64), **{**FAST, "rate": 1.0, "epochs": 1})
    assert all(row["after"] == row["before"] for row in report.blocks)
    assert same(state(model), expected)
    assert on_grids(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": None}, "bits and group go together"),
        ({"bits": None}, "bits and group go together"),
        ({"rank": 4}, "and without rank"),
        ({"bits": 5}, "bits are 2, 3 or 4, and group is a positive integer, not 5 and 16"),
        ({"group": 0}, "not 4 and 0"),
        ({"group": 24}, "q_proj.weight: the pattern 1x24 needs rows"),
    ],
)
def test_a_mistake_changes_nothing(change: dict[str, Any], words: str) -> None:
    model, dense = pair()
    before = state(model)
    with pytest.raises(GossamerError, match=words):
        gossamer.reconstruct(model, dense, data=ids(64), **{**FAST, **change})
    assert same(state(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_only_grids_are_trained_and_the_loss_falls(name: str) -> None:
    model, _ = pair(name)
    first, before, kept = state(model), float(loss_of(model).detach()), masks(model)
    codes = {t.name: found(tiles(t.matrices(), 1, 16).flatten(0, 2), 4) for t in targets(model)}
    tuning = gossamer.tune(model, "OQP", steps=30)
    groups = sum(int(tiles(t.matrices() != 0, 1, 16).any(-1).sum()) for t in targets(copy.deepcopy(pair(name)[0])))
    assert sum(p.numel() for p in tuning.parameters()) == 2 * groups
    assert float(loss_of(model).detach()) == pytest.approx(before, rel=1e-5), "before a step it is the same model"
    losses = train(tuning.attach(optimizer := adamw(tuning, 5e-3)), optimizer, 30)
    assert losses[-1] < losses[0] - 0.01
    assert tuning.finish() is model
    now = state(model)
    assert now.keys() == first.keys()
    names = {t.name for t in targets(model)}
    assert all(torch.equal(now[key], first[key]) for key in now.keys() - names)
    assert on_grids(model)
    assert all(not (masks(model)[key] & ~mask).any() for key, mask in kept.items())
    for target in targets(model):
        q, s, _, _ = found(tiles(target.matrices(), 1, 16).flatten(0, 2), 4)
        was_q, was_s, _, _ = codes[target.name]
        ends = (q.amax(1) == 15) & (q.amin(1) == 0) & (was_q.amax(1) == 15) & (was_q.amin(1) == 0)  # there a grid is one only
        assert torch.equal(q[ends], was_q[ends])
        assert not torch.equal(s[ends], was_s[ends])
    assert all(p.requires_grad for p in model.parameters())


def test_it_goes_on_to_the_same_bits() -> None:
    whole, _ = pair()
    tuning = gossamer.tune(whole, "OQP", steps=8)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    train(tuning.attach(optimizer), optimizer, 4)
    kept = tuning.state_dict()
    train(tuning, optimizer, 4)
    again, _ = pair()
    second = gossamer.tune(again, "OQP", steps=8)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.5)
    second.attach(optimizer).load_state_dict(kept)
    train(second, optimizer, 4)
    assert same(state(tuning.finish()), state(second.finish()))


@pytest.mark.parametrize(
    ("method", "tuner", "words"),
    [
        ("GQSA(bits=None)", "OQP", "q_proj.weight: 64 of 64|of .* groups are on no grid of 4 bits: prune the model by GQSA"),
        ("GQSA", "OQP(bits=2)", "groups are on no grid of 2 bits"),
        ("GQSA", "OQP(group=24)", "the pattern 1x24 needs rows"),
        ("GQSA", "OQP(bits=8)", "OQP wants bits of 2, 3 or 4 and group >= 1"),
    ],
)
def test_what_is_on_no_grid_is_refused_and_left_alone(method: str, tuner: str, words: str) -> None:
    model, _ = pair(method=method)
    before = state(model)
    with pytest.raises(GossamerError, match=words):
        gossamer.tune(model, tuner, steps=1)
    assert same(state(model), before)
    with pytest.raises(GossamerError, match="no weight has groups of zeros"):
        gossamer.tune(causal("llama"), "OQP", steps=1)


def test_both_stages_from_directory_to_directory(tiny_dir: Path, tmp_path: Path) -> None:
    pruned, first, second = tmp_path / "pruned", tmp_path / "first", tmp_path / "second"
    text = tmp_path / "text.txt"
    text.write_text("a text to train on, and on " * 200)
    told = {"data": text, "seqlen": 16, "batch": 2, "teacher": tiny_dir}
    gossamer.prune_checkpoint(tiny_dir, pruned, "GQSA", "1x16", sparsity=0.5, data=text, seqlen=16, samples=8)
    report = gossamer.recover(pruned, first, "Reconstruct(epochs=2, bits=4, group=16)", steps=16, **told)
    assert all(row["after"] <= row["before"] for row in report.blocks)
    gossamer.recover(first, second, "OQP", steps=4, rate=1e-2, **told)
    for folder in (first, second):
        model = gossamer.load(folder)
        kept = masks(gossamer.load(pruned))
        assert all(not (mask & ~kept[name]).any() for name, mask in masks(model).items())
        gossamer.pack(model, "Grouped", pattern="1x16")
    assert not same(state(gossamer.load(first)), state(gossamer.load(second)))


def test_a_layer_without_empty_groups_is_rounded_and_tuned_too() -> None:
    dense = causal("llama")
    for target in targets(dense):
        target.parameter.mul_(5)
    model, whole = copy.deepcopy(dense), "model.layers.0.mlp.up_proj.weight"
    shares = {target.name: 0.5 for target in targets(model)} | {whole: 0.0}
    gossamer.prune(model, "GQSA(bits=None)", "1x16", allocate=shares, data=ids())
    gossamer.reconstruct(model, dense, data=ids(16), **{**FAST, "batch": 2})
    assert on_grids(model)
    assert float((state(model)[whole] == 0).float().mean()) < 0.3
    tuning = gossamer.tune(model, "OQP", steps=1)
    assert len(tuning.parameters()) == 2 * len(list(targets(model)))
    tuning.finish()


@pytest.mark.parametrize(("pattern", "sparsity", "group"), [("Unstructured", 0.8, 4), ("2:4", None, 2)])
def test_zeros_inside_groups_that_were_never_on_a_grid_stay(pattern: str, sparsity: float | None, group: int) -> None:
    dense = causal("llama")
    for target in targets(dense):
        target.parameter.mul_(5)
    model = copy.deepcopy(dense)
    gossamer.prune(model, "Wanda", pattern, sparsity=sparsity, data=ids())
    zeros = {target.name: target.parameter == 0 for target in targets(model)}
    gossamer.reconstruct(model, dense, data=ids(16), **{**FAST, "batch": 2, "group": group})
    assert all(bool((target.parameter[zeros[target.name]] == 0).all()) for target in targets(model))
