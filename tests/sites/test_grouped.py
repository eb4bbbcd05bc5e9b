"""Weights that GQSA leaves: packed by name as Grouped, saved and loaded to the bit, unpacked; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.formats import Grouped
from gossamer.sites._packed_write import sparse_layers
from tests.sites.families import causal, ids

UP = "model.layers.0.mlp.up_proj"


def grouped(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = causal(family, dtype)
    gossamer.prune(model, "GQSA", "1x16", sparsity=0.5, data=ids())
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: stored (in, out), with biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_packed_saved_loaded_and_unpacked_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = grouped(family, dtype)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    report = gossamer.pack(model, "Grouped", pattern="1x16")
    assert {row["format"] for row in report.weights} == {"Grouped"}
    assert {row["kernel"] for row in report.weights} == {"portable"}
    layers = sparse_layers(model)
    assert {type(layer.packed) for layer in layers.values()} == {Grouped}
    assert sum(row["bytes"] for row in report.weights) == sum(layer.packed.bytes for layer in layers.values())
    # Half a byte an entry, half of them, and 3 bytes and a scale for 16; 8 bytes a row.
    for row in report.weights:
        entries, rows = row["shape"][0] * row["shape"][1], row["shape"][1 if family == "gpt2" else 0]
        assert row["bytes"] == entries // 32 * (8 + 3 + dtype.itemsize) + 8 * (rows + 1)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(logits(model), plain, **close)

    gossamer.save(model, tmp_path / "packed", packed=True)
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["weights"]
    assert {(entry["format"], entry["h"], entry["w"]) for entry in said.values()} == {("Grouped", 1, 16)}
    zeros = json.loads((tmp_path / "packed" / "sparsity.json").read_text())["weights"]
    assert all(zeros[name]["nnz"] == int(dense[name].count_nonzero()) for name in zeros)
    loaded = gossamer.load(tmp_path / "packed")
    before = model.state_dict()
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")  # transformers' own
    assert torch.equal(logits(gossamer.load(tmp_path / "again")), logits(model))
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert torch.equal(logits(gossamer.load(tmp_path / "dense")), plain)
    assert gossamer.unpack(model) == len(report.weights)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


def test_loaded_in_another_dtype_it_is_the_same_grid(tmp_path: Path) -> None:
    model = grouped()
    gossamer.pack(model, "Grouped", pattern="1x16")
    gossamer.save(model, tmp_path, packed=True)
    half = gossamer.load(tmp_path, dtype=torch.bfloat16)
    mine, theirs = model.get_submodule(UP).packed, half.get_submodule(UP).packed
    assert torch.equal(theirs.values, mine.values)
    assert theirs.dtype is torch.bfloat16
    assert torch.equal(theirs.dense(), mine.dense().bfloat16())


@pytest.mark.parametrize(
    ("method", "pattern", "words"),
    [
        ("GQSA(bits=None)", "1x16", "up_proj|q_proj.*are on no grid of 4 bits: the format Grouped wants weights that GQSA"),
        ("GQSA", None, "packs a block pattern, such as 1x16, not None"),
        ("GQSA", "2:4", "packs a block pattern, such as 1x16, not 2:4"),
        ("GQSA", "1x32", "are on no grid of 4 bits"),
    ],
)
def test_what_cannot_be_packed_leaves_the_model_as_it_was(method: str, pattern: str | None, words: str) -> None:
    model = causal("llama")
    gossamer.prune(model, method, "1x16", sparsity=0.5, data=ids())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GossamerError, match=words):
        gossamer.pack(model, "Grouped", pattern=pattern)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_dtype_in_the_config_is_found(tmp_path: Path) -> None:
    model = grouped()
    gossamer.pack(model, "Grouped", pattern="1x16")
    gossamer.save(model, tmp_path, packed=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weights"][UP]["dtype"] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GossamerError, match=rf"{UP}.scale is torch.float32, and its config says torch.float16"):
        gossamer.load(tmp_path)
