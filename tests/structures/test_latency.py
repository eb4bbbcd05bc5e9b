"""A budget of seconds, with operations counted in place of a clock: what is asked for is compared with what comes out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.structure import Parameters
from gossamer.sites import _latency
from gossamer.sites._latency import Latency, _rising, measure
from tests.sites.families import causal, ids
from tests.structures.methods import group_of, operations

AT = (2, 24)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_latency, "seconds", operations)


def of_pass(model: Any) -> float:
    return operations(lambda _: model(torch.zeros(AT, dtype=torch.long), use_cache=False), torch.device("cpu"), 1)


def test_between_two_numbers_the_table_is_a_straight_line() -> None:
    group = group_of(torch.zeros(3, 10))
    table = Latency(7.0, {"channels": [(1, 2.0), (5, 4.0), (10, 5.0)]})
    assert [table.cost(group, n) for n in (1, 3, 5, 7, 10)] == [2.0, 3.0, 4.0, 4.4, 5.0]
    with pytest.raises(gossamer.GossamerError, match="block 0 has 11 channels"):
        table.cost(group, 11)
    assert table.says(0.5) == "a speed-up of 2.00"
    assert Parameters(100).cost(group_of(torch.zeros(3, 10), torch.zeros(10, 4)), 2) == 2 * (3 + 4)


def test_fewer_members_never_take_longer() -> None:
    assert _rising([(10, 5.0), (8, 5.5), (4, 3.0), (1, 3.1)]) == [(1, 3.0), (4, 3.0), (8, 5.0), (10, 5.0)]


def test_the_table_is_of_one_block_and_the_total_of_all(tiny_llama: Callable[..., Any], counted: None) -> None:
    model = tiny_llama()
    found = measure(model, ["channels", "heads"], AT, False)
    assert found.total == of_pass(model)
    tokens, hidden = AT[0] * AT[1], 32
    (least, low), *_, (most, high) = found.blocks["channels"]
    assert (least, most) == (1, 64)
    assert high - low == 2 * 63 * 3 * hidden * tokens  # gate, up and down of 63 channels: a product and a sum each
    assert [n for n, _ in found.blocks["heads"]] == [1, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("speedup", [1.1, 1.3])
def test_what_was_asked_for_comes_out(family: str, speedup: float, counted: None) -> None:
    model = causal(family)
    before = of_pass(model)
    report = gossamer.shrink(model, "ZipLM(multiple=1)", speedup=speedup, at=AT, data=ids(), progress=False)
    reached = before / of_pass(model)
    assert speedup <= reached < 1.05 * speedup
    assert report.structure is not None
    assert report.structure["latency"]["speedup"] == pytest.approx([speedup, reached])
    assert f"{reached:.2f}x as fast ({speedup:.2f} asked for)" in str(report)


def test_time_and_parameters_choose_differently(tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    free_heads = Latency(200.0, {"heads": [(1, 10.0), (2, 10.0)], "channels": [(1, 10.0), (64, 73.0)]})
    monkeypatch.setattr("gossamer.sites.shrinking.measure", lambda *a: free_heads)
    model = tiny_llama()
    report = gossamer.shrink(model, "ZipLM(multiple=1)", speedup=2.0, at=AT, data=ids(), progress=False)
    assert all(row.get("heads", [2, 2]) == [2, 2] for row in report.blocks)
    # 166 s of 200 are in the tables; 100 have to go, at a second a channel
    assert sum(64 - row["channels"][1] for row in report.blocks) == 100


def test_more_than_the_table_can_give_is_refused_with_what_it_can(tiny_llama: Callable[..., Any], counted: None) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(gossamer.GossamerError, match=r"ends at a speed-up of \d\.\d\d; a speed-up of 50.00 was asked for"):
        gossamer.shrink(model, "ZipLM", speedup=50.0, at=AT, data=ids(), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        ("Depth", {"speedup": 1.5}, "Depth.* takes a sparsity, no speed-up; what goes by time is ZipLM"),
        ("ZipLM", {"speedup": 1.5, "sparsity": 0.2}, "either sparsity or speedup"),
        ("ZipLM", {}, "either sparsity or speedup"),
        ("ZipLM", {"speedup": 1.0}, "over 1; got 1.0"),
        ("ZipLM", {"speedup": float("inf")}, "over 1; got inf"),
        ("ZipLM", {"speedup": 1.5, "at": (0, 4)}, "batch, tokens"),
        ("ZipLM", {"speedup": 1.5, "at": (1, 5000)}, "at=1x5000: windows of 5000 tokens are longer than the 128"),
    ],
)
def test_goals_that_make_no_sense(method: str, how: dict[str, Any], message: str, tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(gossamer.GossamerError, match=message):
        gossamer.shrink(tiny_llama(), method, data=ids(), **how)


def test_blocks_that_differ_have_no_one_table(tiny_llama: Callable[..., Any], counted: None) -> None:
    model = tiny_llama()
    gossamer.shrink(model, "CFSP(a=5000.0)", sparsity=0.3, data=ids(), progress=False)
    with pytest.raises(gossamer.GossamerError, match="differ in their channels"):
        gossamer.shrink(model, "ZipLM", speedup=1.1, at=AT, data=ids(), progress=False)


def test_one_member_has_a_table_of_one_line(counted: None) -> None:
    model = causal("llama", num_key_value_heads=1)
    before = of_pass(model)
    gossamer.shrink(model, "ZipLM(multiple=1)", speedup=1.2, at=AT, data=ids(), progress=False)
    assert 1.2 <= before / of_pass(model) < 1.26
