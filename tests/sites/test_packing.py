"""Packing in memory: what is swapped, what is left, what it computes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.sites import packing
from gossamer.sites._sparse_linear import SparseLinear
from gossamer.timing import Product, Table
from tests.sites.families import CAUSAL, causal, ids


def sparse(model: torch.nn.Module) -> dict[str, SparseLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


@pytest.fixture
def pruned(tiny_llama: Any) -> Any:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    return model


class Measured(Table):
    """A table whose times are given: dense 1 s, sparse as the function says."""

    def __init__(self, path: Path, ratio: Any) -> None:
        super().__init__("cpu", path / "timings.json")
        self.ratio, self.asked = ratio, []

    def __getitem__(self, product: Product) -> dict[str, Any]:
        self.asked.append(product)
        return {"seconds": 1.0 if product.format == "dense" else 1 / self.ratio(product), "bytes": 1, "kernel": "portable"}


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_logits_are_the_dense_ones(family: str) -> None:
    model = causal(family)
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = model(ids()).logits
        report = gossamer.pack(model, "Bitmask")
        packed = model(ids()).logits
    assert sparse(model)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-5)
    assert gossamer.unpack(model) == len([r for r in report.weights if r["format"] == "Bitmask"])
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_only_zeros_are_packed(pruned: Any) -> None:
    weight = pruned.model.layers[0].mlp.up_proj.weight
    weight.data.fill_(1.0)
    report = gossamer.pack(pruned, "Bitmask")
    rows = {r["name"]: r for r in report.weights}
    assert rows["model.layers.0.mlp.up_proj.weight"]["format"] == "dense"
    assert rows["model.layers.0.mlp.up_proj.weight"]["why"] == "it has no zeros"
    assert rows["model.layers.0.mlp.down_proj.weight"]["kernel"] in ("avx512", "avx2", "portable")
    assert isinstance(pruned.model.layers[0].mlp.up_proj, torch.nn.Linear)


@pytest.mark.parametrize("format", ["Bitmask", "NM", "Sliced", "Tiled"])
def test_each_format_runs_the_same_model(tiny_llama: Any, format: str) -> None:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "2:4")
    with torch.no_grad():
        dense = model(ids()).logits
        gossamer.pack(model, format, pattern="2:4")
        torch.testing.assert_close(model(ids()).logits, dense, rtol=1e-4, atol=1e-5)
    assert {m.layout.__name__ for m in sparse(model).values()} == {format}


def test_measurements_decide(pruned: Any, tmp_path: Path) -> None:
    wide = lambda p: 2.0 if p.out == 64 else 0.5  # noqa: E731
    report = gossamer.pack(pruned, table=Measured(tmp_path, wide))
    assert {n.rsplit(".", 1)[1] for n in sparse(pruned)} == {"gate_proj", "up_proj"}
    row = next(r for r in report.weights if r["format"] == "Bitmask")
    assert row["ratios"] == {"1": 2.0}
    assert report.recipe["said"] == "4 of 14 weights packed"


def test_every_batch_must_be_faster(pruned: Any, tmp_path: Path) -> None:
    table = Measured(tmp_path, lambda p: 3.0 if p.batch == 1 else 0.9)
    report = gossamer.pack(pruned, batch=(1, 8), table=table)
    assert not sparse(pruned)
    assert report.recipe["said"].startswith(
        "nothing was packed, the model stays dense: the best weight was Bitmask measured 3.00x"
    )


def test_a_weight_is_judged_by_no_more_zeros_than_it_has(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.58)
    table = Measured(tmp_path, lambda p: 1.0)
    gossamer.pack(model, table=table)
    assert {p.sparsity for p in table.asked if p.format != "dense"} <= {0.5, 0.55}


def test_nothing_to_pack(tiny_llama: Any) -> None:
    with pytest.raises(GossamerError, match=r"nothing to pack: no weight has more than .* zeros; prune the model first"):
        gossamer.pack(tiny_llama())


def test_refusals_change_nothing(pruned: Any) -> None:
    for call, words in {
        lambda: gossamer.pack(pruned, "Bitmsk"): "unknown format 'Bitmsk'; known: NM, Bitmask, Block, Grouped, Sliced, Tiled",
        lambda: gossamer.pack(pruned, "NM"): "packs an N:M pattern",
        lambda: gossamer.pack(pruned, "NM", pattern="2:4"): "more than 2:4 allows",
        lambda: gossamer.pack(pruned, "Bitmask", kernel="triton"): "triton",
        lambda: gossamer.pack(pruned, "Bitmask", kernel="fast"): "unknown kernel 'fast'",
        lambda: gossamer.pack(pruned, "Bitmask", targets="nothing"): "no weight matches",
    }.items():
        with pytest.raises(GossamerError, match=words):
            call()
        assert not sparse(pruned)


def test_packing_twice_is_refused(pruned: Any) -> None:
    gossamer.pack(pruned, "Bitmask")
    for again in (lambda: gossamer.pack(pruned, "Bitmask"), lambda: gossamer.prune(pruned, "Magnitude", "2:4")):
        with pytest.raises(GossamerError, match=r"holds packed weights: make them dense again first, with gossamer\.unpack"):
            again()


def test_other_dtypes_say_what_is_supported(pruned: Any) -> None:
    with pytest.raises(GossamerError, match="cannot pack float64: supported are bfloat16, float16, float32"):
        gossamer.pack(pruned.double(), "Bitmask")


def test_a_named_kernel_runs(pruned: Any) -> None:
    report = gossamer.pack(pruned, "Bitmask", kernel="reference")
    assert {r["kernel"] for r in report.weights} == {"reference"}


def test_gradients_reach_the_input(pruned: Any) -> None:
    x = torch.randn(2, 5, 32, requires_grad=True)
    block = pruned.model.layers[0].mlp
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    gossamer.pack(pruned, "Bitmask")
    (found,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_state_dict_holds_what_is_stored(pruned: Any) -> None:
    gossamer.pack(pruned, "Bitmask")
    names = {n.rsplit(".", 1)[1] for n in pruned.state_dict() if "up_proj" in n}
    assert names == {"values", "bits"}  # offsets follow from the bits


def test_transformers_saves_a_packed_model(pruned: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        dense = pruned(ids()).logits
        gossamer.pack(pruned, "Bitmask")
        pruned.save_pretrained(tmp_path / "packed")
        again = gossamer.load(tmp_path / "packed")
        assert sparse(again)
        torch.testing.assert_close(again(ids()).logits, dense, rtol=1e-4, atol=1e-5)
        gossamer.unpack(pruned)
        pruned.save_pretrained(tmp_path / "dense")
        again = gossamer.load(tmp_path / "dense")
        assert not sparse(again)
        assert torch.equal(again(ids()).logits, dense)


def test_the_report_is_json(pruned: Any, tmp_path: Path) -> None:
    report = gossamer.pack(pruned, "Bitmask")
    report.save(tmp_path / "pack.json")
    assert gossamer.Report.load(tmp_path / "pack.json") == report
    assert packing.LEAST == 0.05
