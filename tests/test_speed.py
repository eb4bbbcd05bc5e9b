"""Bench and plan: their documents, and that a plan says beforehand what a bench then finds."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.forecast import _shapes
from gossamer.shapes import SHAPES, config_of, random_model
from gossamer.speed import mask_at_random
from gossamer.timing import Product, Table


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr("gossamer.timing.ROTATE_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr("gossamer.timing.REPEATS", 5)
    return Table(path=tmp_path / "timings.json")


class Given(Table):
    """Dense products take 1 ms, Bitmask ones what the function says; nothing is measured."""

    def __init__(self, path: Path, sparse: Any) -> None:
        super().__init__("cpu", path)
        self.sparse = sparse

    def __getitem__(self, product: Product) -> dict[str, Any]:
        dense = product.out * product.in_ * 2
        if product.format == "dense":
            return {"seconds": 1e-3, "bytes": dense, "kernel": "torch"}
        return {"seconds": self.sparse(product), "bytes": dense // 2, "kernel": "portable"}

    def once(self, name: str, measured: Any) -> dict[str, Any]:
        return {"seconds": 0.030 if '"step": 2' in name else 0.020}


def test_bench_measures_both_and_packs(tiny_llama: Any, table: Table) -> None:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    found = gossamer.bench(model, batch=(1, 2), context=8, prefill=16, table=table)
    assert {tuple(r["shape"]) for r in found["products"]} == {(32, 32), (16, 32), (64, 32), (32, 64)}
    assert {r["batch"] for r in found["products"]} == {1, 2}
    for row in found["products"]:
        assert row["ratio"] == row["dense_seconds"] / row["seconds"]
        assert row["limit"] == row["dense_bytes"] / row["bytes"]
    assert [r["batch"] for r in found["decode"]] == [1, 2]
    assert all(r["dense"] > 0 and r["packed"] > 0 for r in found["decode"])
    sparse = [r for r in found["weights"] if r["format"] != "dense"]
    saved = sum(r["dense_bytes"] - r["bytes"] for r in sparse)
    assert found["bytes"]["dense"] - found["bytes"]["packed"] == saved


def test_bench_wants_zeros(tiny_llama: Any, table: Table) -> None:
    with pytest.raises(GossamerError, match="nothing to bench: the model has no zeros"):
        gossamer.bench(tiny_llama(), table=table)


def test_plan_adds_up(tmp_path: Path) -> None:
    table = Given(tmp_path / "t.json", lambda p: 0.4e-3 if p.sparsity > 0.6 else 2e-3)
    found = gossamer.plan(config_of("llama-1b"), patterns=["Unstructured"], sparsities=[0.5, 0.7], table=table)
    assert found["dense"]["seconds"] == pytest.approx(0.020 + 15 * 0.010)
    half, most = found["rows"]
    assert (half["pays"], most["pays"]) == (False, True)
    assert half["ratio"] == pytest.approx(1.0)
    assert most["seconds"] == pytest.approx(0.170 - 16 * 7 * 0.6e-3)
    linear = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048) * 2
    assert found["dense"]["bytes"] == linear + (128256 * 2048 + 33 * 2048) * 2
    assert found["dense"]["bytes"] - most["bytes"] == linear // 2


def test_plan_is_what_bench_finds(tiny_llama: Any, tmp_path: Path) -> None:
    """On given product times both add up the same linears."""
    config = tiny_llama().config
    shapes, other = _shapes(config, "float32")
    assert dict(shapes) == {(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2}
    model = tiny_llama()
    assert other + sum(4 * n * a * b for (a, b), n in shapes.items()) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_have_their_size(name: str) -> None:
    model = random_model(config_of(name), torch.bfloat16, "meta")
    billions = {"llama-1b": 1.236, "llama-3b": 3.213, "llama-8b": 8.030}[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)


def test_random_masks_have_the_sparsity_asked_for(tiny_llama: Any) -> None:
    model = tiny_llama()
    mask_at_random(model, 0.75)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.75, abs=0.05)
    mask_at_random(model, 0, "1:4")
    assert int((weight.view(-1, 4) != 0).sum(-1).max()) <= 1


def test_a_config_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="no configuration"):
        config_of(tmp_path / "nothing.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(GossamerError, match="is not JSON"):
        config_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}')
    with pytest.raises(GossamerError, match="cannot read the config"):
        config_of(tmp_path)
