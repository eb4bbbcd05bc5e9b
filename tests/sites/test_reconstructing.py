"""Reconstruction: the kept weights of each block are refit to what the dense block puts out."""

import copy
import math
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.sites import _refit
from gossamer.sites._refit import Kept, _stored
from gossamer.sites._walk import targets
from tests.sites.families import CAUSAL, causal, ids

FAST = {"epochs": 4, "batch": 4, "rate": 2e-3}


def pair(name: str = "llama", pattern: str = "2:4", dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Any, Any]:
    """Return a pruned model and the dense one it was; weights large enough that blocks do something."""
    model = causal(name, **overrides)
    for target in targets(model):
        target.parameter.mul_(5)
    dense = copy.deepcopy(model.to(dtype))
    gossamer.prune(model, "Magnitude", pattern)
    return model, dense


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {target.name: target.parameter != 0 for target in targets(model)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Toy(nn.Module):
    """Linear blocks and nothing else."""

    def __init__(self, blocks: int = 1, size: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=blocks, hidden_size=size)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(size, size, bias=False)) for _ in range(blocks))

    def forward(self, x: Tensor, use_cache: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_linear_block_comes_to_the_masked_least_squares_solution() -> None:
    torch.manual_seed(0)
    dense = Toy()
    model = copy.deepcopy(dense)
    gossamer.prune(model, "Magnitude", "2:4")
    mask = model.layers[0][0].weight != 0
    mixed = torch.randn(8, 8) / 3 + torch.eye(8)  # inputs that go together, so that the others can stand in for a pruned one
    batches = [{"x": torch.randn(1, 32, 8) @ mixed} for _ in range(8)]
    report = gossamer.reconstruct(model, dense, data=batches, epochs=50, rate=5e-2)
    x = torch.cat([batch["x"][0] for batch in batches[:7]])  # the last one is held out
    y = x @ dense.layers[0][0].weight.detach().T
    for row, kept, wanted in zip(model.layers[0][0].weight.detach(), mask, y.T, strict=True):
        torch.testing.assert_close(row[kept], torch.linalg.lstsq(x[:, kept], wanted[:, None]).solution[:, 0], atol=0.02, rtol=0)
        assert not row[~kept].any()
    assert report.blocks[0]["after"] < report.blocks[0]["before"]


@pytest.mark.parametrize("parts", ["block", "halves"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_gets_closer_to_its_teacher_with_the_same_zeros(name: str, parts: str) -> None:
    model, dense = pair(name)
    before, taught = masks(model), state(dense)
    report = gossamer.reconstruct(model, dense, data=ids(64), parts=parts, **FAST)
    assert same(masks(model), before)
    assert same(state(dense), taught)
    assert report.kind == "reconstruct"
    assert report.totals["sparsity"] == pytest.approx(0.5)
    assert {row["block"] for row in report.blocks} == {0, 1}
    assert (len(report.blocks) == 2) == (parts == "block")
    assert all(row["after"] < row["before"] for row in report.blocks)
    assert all(not p.grad and p.requires_grad for p in model.parameters())


def test_the_model_as_a_whole_gets_closer_on_text_it_was_not_fitted_on() -> None:
    model, dense = pair()
    new = ids(4, seed=7)

    def distance() -> float:
        with torch.no_grad():
            return float((model(new).logits - dense(new).logits).square().mean())

    before = distance()
    gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    assert distance() < 0.8 * before


@pytest.mark.parametrize("change", [{"inputs": "dense"}, {"rank": 4, "rate": 1e-2}, {"targets": "*.mlp.*"}])
def test_its_options_keep_the_zeros_and_lower_the_error(change: dict[str, Any]) -> None:
    model, dense = pair()
    before, old = masks(model), state(model)
    report = gossamer.reconstruct(model, dense, data=ids(64), **{**FAST, **change})
    after = masks(model)
    assert same({r["name"]: after[r["name"]] for r in report.weights}, {r["name"]: before[r["name"]] for r in report.weights})
    assert all(row["after"] < row["before"] for row in report.blocks)
    if "rank" in change:
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}
        assert moved == set(before)
        assert repr(gossamer.Reconstruct(rank=4)) == "Reconstruct(rank=4)"


def test_a_low_rank_update_is_the_mask_times_a_product() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 8)
    mask = torch.rand(6, 8) > 0.5
    update = _refit.LowRank({"w": w * mask}, {"w": mask}, torch.Generator().manual_seed(0), 2)
    assert torch.equal(update.weights()["w"], w * mask)
    with torch.no_grad():
        update.leaves["w.b"].normal_()
    expected = w * mask + mask * (update.leaves["w.b"] @ update.leaves["w.a"])
    torch.testing.assert_close(update.weights()["w"], expected)
    assert Kept({"w": w}, {"w": mask}, torch.Generator()).weights()["w"][~mask].count_nonzero() == 0


def test_a_rate_that_makes_it_worse_leaves_every_bit_as_it_was() -> None:
    model, dense = pair()
    old = state(model)
    report = gossamer.reconstruct(model, dense, data=ids(8), epochs=1, batch=1, rate=30.0)
    assert all(row["after"] == row["before"] for row in report.blocks)
    assert same(state(model), old)


def test_the_same_seed_gives_the_same_bits_and_another_one_others() -> None:
    runs = []
    for seed in (0, 0, 1):
        model, dense = pair()
        gossamer.reconstruct(model, dense, data=ids(16), seed=seed, **FAST)
        runs.append(state(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_is_refit_in_float32_and_stays_of_16_bits(dtype: torch.dtype) -> None:
    model, dense = pair(dtype=dtype)
    before = masks(model)
    report = gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert same(masks(model), before)
    assert all(row["after"] < row["before"] for row in report.blocks)


def test_a_kept_weight_that_would_round_to_zero_is_raised_and_counted() -> None:
    w, mask = torch.tensor([1e-9, -1e-9, 0.0, 0.5]), torch.tensor([True, True, False, True])
    stored, count = _stored(w, mask, torch.float16)
    least = torch.finfo(torch.float16).tiny
    assert stored.tolist() == [least, -least, 0.0, 0.5]
    assert count == 2


def test_only_one_block_has_an_optimizer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    alive = []
    adam = torch.optim.Adam

    def counted(leaves: Any, **how: Any) -> Any:
        alive.append(sum(ref() is not None for ref in made))
        optimizer = adam(leaves, **how)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(torch.optim, "Adam", counted)
    model, dense = pair(num_hidden_layers=4)
    gossamer.reconstruct(model, dense, data=ids(16), **FAST)
    assert alive == [0, 0, 0, 0]


def test_a_block_is_worked_on_at_the_device_and_goes_home() -> None:
    model, dense = pair()
    twin = copy.deepcopy(model)
    gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    gossamer.reconstruct(twin, dense, data=ids(64), device="cpu", **FAST)
    assert same(state(model), state(twin))


def test_a_run_goes_on_after_the_last_finished_block_to_the_same_bits() -> None:
    whole, dense = pair(num_hidden_layers=3)
    part = copy.deepcopy(whole)
    method, batches = gossamer.Reconstruct(**FAST), [{"input_ids": row[None]} for row in ids(8)]
    method(whole, dense, batches)

    class Killed(BaseException):
        pass

    def kill(index: int, rows: list[dict[str, Any]]) -> None:
        if index == 1:
            raise Killed

    with pytest.raises(Killed):
        method(part, dense, batches, after_block=kill)
    report = method(part, dense, batches, start_at=2)
    assert [row["block"] for row in report.blocks] == [2]
    assert same(state(part), state(whole))


def test_padding_does_not_count() -> None:
    tokens, attended = ids(8), torch.ones(8, 16, dtype=torch.int64)
    attended[:, 12:] = 0
    results = []
    for filler in (3, 90):
        model, dense = pair()
        padded = tokens.clone()
        padded[:, 12:] = filler
        rows = zip(padded.split(1), attended.split(1), strict=True)
        gossamer.reconstruct(model, dense, data=[{"input_ids": i, "attention_mask": m} for i, m in rows], **FAST)
        results.append(torch.cat([target.parameter.flatten() for target in targets(model)]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_modes_hooks_and_forwards_are_as_they_were() -> None:
    model, dense = pair()
    model.train()
    gossamer.reconstruct(model, dense, data=ids(16), **FAST)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for m in (model, dense) for module in m.modules())


def test_the_report_says_what_was_done_and_survives_json() -> None:
    model, dense = pair()
    report = gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    assert gossamer.Report.from_json(report.to_json()) == report
    assert report.recipe["method"] == "Reconstruct(epochs=4, batch=4, rate=0.002)"
    assert report.blocks is not None
    assert report.blocks[1].keys() == {"name", "block", "before", "after", "steps", "trained", "raised", "seconds"}
    assert report.blocks[1]["name"] == "model.layers.1"
    assert report.blocks[1]["steps"] == 56
    assert str(report).startswith("Reconstruct(epochs=4, batch=4, rate=0.002): 14 weights")


def unpruned() -> tuple[Any, Any]:
    return causal("llama"), causal("llama")


def itself() -> tuple[Any, Any]:
    model, _ = pair()
    return model, model


def other() -> tuple[Any, Any]:
    return pair()[0], causal("llama", hidden_size=64)


def two_stacks() -> tuple[Any, Any]:
    import transformers

    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = transformers.BartConfig(**sizes, vocab_size=128, encoder_ffn_dim=32, decoder_ffn_dim=32)
    model = transformers.BartForConditionalGeneration(config)
    dense = copy.deepcopy(model)
    gossamer.prune(model, "Magnitude", "2:4")
    return model, dense


def broken_teacher() -> tuple[Any, Any]:
    model, dense = pair()
    dense.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    return model, dense


BAD: list[tuple[Callable[[], tuple[Any, Any]], dict[str, Any], str]] = [
    (unpruned, {}, "none of the 14 weights has zeros: prune the model first"),
    (itself, {}, "the teacher is the student itself"),
    (other, {}, "student and teacher differ in hidden_size: 32 and 64"),
    (two_stacks, {}, "has 2 stacks of blocks"),
    (broken_teacher, {}, "layers.1.mlp.up_proj.weight: 1 of 2048 weights are NaN"),
    (pair, {"data": None}, "needs calibration data"),
    (pair, {"data": torch.zeros(2, 3)}, "token ids are integers"),
    (pair, {"data": ids(4), "batch": 4}, "at least 2 batches"),
    (pair, {"data": ids(8) + 128}, "128"),
    (pair, {"epochs": 0}, "epochs is a positive integer, not 0"),
    (pair, {"batch": 1.5}, "batch is a positive integer, not 1.5"),
    (pair, {"rank": 0}, "rank is a positive integer, not 0"),
    (pair, {"rate": 0.0}, "rate is more than 0, not 0.0"),
    (pair, {"inputs": "both"}, "inputs is pruned or dense, not 'both'"),
    (pair, {"parts": "third"}, "parts is block or halves, not 'third'"),
    (pair, {"targets": "*.nothing"}, "no weight matches"),
]


@pytest.mark.parametrize(("made", "change", "message"), BAD, ids=[f"{m.__name__} {c}"[:50] for m, c, _ in BAD])
def test_a_mistake_is_one_clear_line_and_changes_nothing(made: Any, change: dict[str, Any], message: str) -> None:
    model, dense = made()
    before = state(model)
    with pytest.raises(gossamer.GossamerError, match=message) as caught:
        gossamer.reconstruct(model, dense, **{"data": ids(8), "batch": 1, **change})
    assert "\n" not in str(caught.value)
    assert same(state(model), before)


def test_packed_weights_are_refused() -> None:
    model, dense = pair(hidden_size=64, intermediate_size=128)
    gossamer.pack(model, "Bitmask")
    with pytest.raises(gossamer.GossamerError, match="packed weights"):
        gossamer.reconstruct(model, dense, data=ids(64), **FAST)


def test_an_error_that_becomes_nan_names_the_block_and_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = pair()
    before = state(model)
    told = iter([0.5] * 60 + [math.nan] * 9)
    monkeypatch.setattr(Tensor, "item", lambda self: next(told))
    with pytest.raises(gossamer.GossamerError, match=r"model.layers.1: the error is NaN or infinite at step \d+ of 56"):
        gossamer.reconstruct(model, dense, data=ids(64), **FAST)
    monkeypatch.undo()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".layers.0." in name for name in changed)
