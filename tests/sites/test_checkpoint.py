"""Directory to directory: the same bits as in memory, whole or not at all, and on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.models import quiet
from gossamer.sites._allocated import allocated
from gossamer.sites._run import Run
from gossamer.sites._stream import Checkpoint
from tests.sites.families import CAUSAL, causal

TEXT = {"data": "builtin", "seqlen": 16, "samples": 8}
CASES = [
    ("Magnitude", "4:8", None, "uniform"),
    ("Wanda", "2:4", None, "uniform"),
    ("SparseGPT", "Unstructured", 0.5, "uniform"),
    ("Wanda", "Unstructured", 0.6, "owl"),
    ("Magnitude", "Unstructured", 0.6, "global_"),
    ("Gradient", "Unstructured", 0.5, "uniform"),
    ("ALPS", "2:4", None, "uniform"),
    ("DSnoT", "Unstructured", 0.5, "uniform"),
    ("Asymmetric(SparseGPT())", "2:4", None, "uniform"),
    ("Parallel(NetTrim())", "2:4", None, "uniform"),
    ("SparseGPT", "NM(2, 4, permute=True)", None, "uniform"),
    ("SparseLLM(steps=2)", "NM(2, 4, permute=True)", None, "uniform"),
    ("OBERT", "1x4", 0.5, "uniform"),
    ("SynFlow(rounds=3)", "Unstructured", 0.6, "global_"),
    ("GraSP", "Unstructured", 0.5, "uniform"),
    ("SparseGPT", "4:8", None, "searched(steps=8)"),
    ("Wanda", "Unstructured", 0.6, "ecoflap(samples=2)"),
    ("Magnitude", "Unstructured", None, "sap"),
]


def saved(family: str, folder: Path, tokenizer: Any, **overrides: Any) -> Path:
    with quiet():
        causal(family, **overrides).save_pretrained(folder, max_shard_size="40KB")
        tokenizer.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(("method", "pattern", "sparsity", "allocate"), CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_streaming_gives_the_bits_of_pruning_in_memory(
    family: str, method: str, pattern: str, sparsity: float | None, allocate: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    if family == "mixtral" and method.startswith("SparseLLM"):
        pytest.skip("refused: it wants one MLP in each block")
    source = saved(family, tmp_path / "in", tiny_tokenizer)
    asked = {"sparsity": sparsity, "allocate": allocate, **TEXT}
    gossamer.prune_checkpoint(source, tmp_path / "out", method, pattern, **asked)
    model = AutoModelForCausalLM.from_pretrained(source)
    gossamer.prune(model, method, pattern, tokenizer=tiny_tokenizer, **asked)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("family", [f for f in CAUSAL if f not in ("llama", "gpt2", "mixtral")])
def test_every_family_streams(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = saved(family, tmp_path / "in", tiny_tokenizer)
    gossamer.prune_checkpoint(source, tmp_path / "out", "Wanda", "2:4", **TEXT)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    half = [name for name in after if int((after[name] == 0).sum()) * 2 == after[name].numel()]
    assert len(half) >= 2 * CAUSAL[family][2]
    assert all(torch.equal(before[name], after[name]) for name in after if name not in half)


def test_the_result_keeps_config_and_tokenizer_and_reports(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer)
    report = gossamer.prune_checkpoint(source, tmp_path / "out", "SparseGPT", "2:4", name="tiny", **TEXT)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "report.json", "sparsity.json", "model.safetensors.index.json"} <= names
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert gossamer.Report.load(tmp_path / "out" / "report.json") == report
    assert report.recipe["command"].startswith("gossamer prune tiny --method SparseGPT --pattern 2:4 --data builtin")
    for row in report.weights:
        assert set(row) >= {"name", "shape", "sparsity", "nnz"}


@pytest.mark.parametrize("streamed", ["Wanda", "SparseGPT", "Magnitude"])
def test_one_block_is_in_memory_at_a_time(streamed: str, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer, num_hidden_layers=4)
    present: list[int] = []
    fetch = Checkpoint.fetch

    def spying(self: Checkpoint, name: str, index: int) -> None:
        fetch(self, name, index)
        present.append(sum(any(not p.is_meta for p in block.parameters()) for _, _, block in self))

    monkeypatch.setattr(Checkpoint, "fetch", spying)
    gossamer.prune_checkpoint(source, tmp_path / "out", streamed, "2:4", **TEXT)
    assert present == [1, 1, 1, 1]


def test_the_source_is_never_written(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = saved("mixtral", tmp_path / "in", tiny_tokenizer)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    gossamer.prune_checkpoint(source, tmp_path / "out", "SparseGPT", "2:4", **TEXT)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


class _Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


def test_an_allocation_that_was_found_outlasts_a_kill(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer)
    how = {**TEXT, "sparsity": 0.6, "allocate": "searched(steps=4)"}
    gossamer.prune_checkpoint(source, tmp_path / "whole", "Magnitude", "Unstructured", **how)
    found: list[int] = []
    monkeypatch.setattr("gossamer.sites.checkpoint.allocated", lambda *args: (found.append(1), allocated(*args))[1])

    def killed(*_: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_block", killed)
        with pytest.raises(_Killed):
            gossamer.prune_checkpoint(source, tmp_path / "out", "Magnitude", "Unstructured", **how)
    gossamer.prune_checkpoint(source, tmp_path / "out", "Magnitude", "Unstructured", **how)
    assert found == [1]
    one, two = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


STOPPED = ["SparseGPT", "Magnitude", "OBERT", "Asymmetric(Wanda())", "Parallel(Wanda())", "SparseLLM(steps=2)"]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("method", STOPPED)
def test_a_stopped_run_goes_on_after_the_last_finished_block(
    method: str, after: int, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer, num_hidden_layers=4)
    gossamer.prune_checkpoint(source, tmp_path / "whole", method, "2:4", **TEXT)
    fetched: list[int] = []
    fetch = Checkpoint.fetch

    def dying(self: Checkpoint, name: str, index: int) -> None:
        if len(fetched) == after:
            raise _Killed
        fetched.append(index)
        fetch(self, name, index)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "fetch", dying)
        with pytest.raises(_Killed):
            gossamer.prune_checkpoint(source, tmp_path / "out", method, "2:4", **TEXT)
    assert not (tmp_path / "out").exists()
    again: list[int] = []
    monkeypatch.setattr(Checkpoint, "fetch", lambda self, n, i: (again.append(i), fetch(self, n, i))[1])
    report = gossamer.prune_checkpoint(source, tmp_path / "out", method, "2:4", **TEXT)
    assert again == list(range(0 if method == "OBERT" else after, 4))  # whose gradients come through the blocks before
    assert len(report.weights) == 28
    ours, whole = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3])
def test_sigkill_at_any_moment(delay: float, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The real thing: the process is killed while blocks are being pruned, and the same command is run again."""
    source = saved("llama", tmp_path / "in", tiny_tokenizer, num_hidden_layers=8)
    what = ["--method", "SparseGPT", "--pattern", "2:4", "--data", "builtin", "--seqlen", "16", "--samples", "8"]
    command = [sys.executable, "-m", "gossamer", "prune", str(source), *what, "--quiet", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "out")])
    state = tmp_path / ".out.partial" / "state.json"
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() or (tmp_path / "out" / "report.json").exists()
    if not (tmp_path / "out").exists():
        subprocess.run([*command, str(tmp_path / "out")], check=True)
    ours, whole = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_another_command_does_not_go_on_from_it(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer)
    gossamer.prune_checkpoint(source, tmp_path / "right", "Wanda", "1:4", **TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "complete", lambda *_: (_ for _ in ()).throw(_Killed()))
        with pytest.raises(_Killed):
            gossamer.prune_checkpoint(source, tmp_path / "out", "Wanda", "2:4", **TEXT)
    gossamer.prune_checkpoint(source, tmp_path / "out", "Wanda", "1:4", **TEXT)
    ours, right = tensors(tmp_path / "out"), tensors(tmp_path / "right")
    assert all(torch.equal(ours[name], right[name]) for name in right)


def test_an_output_in_use_is_left_alone_and_replaced_only_by_force(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(GossamerError, match=r"not empty.*--force"):
        gossamer.prune_checkpoint(source, tmp_path / "out", "Magnitude", "2:4")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    gossamer.prune_checkpoint(source, tmp_path / "out", "Magnitude", "2:4", force=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(GossamerError, match="is the model itself"):
        gossamer.prune_checkpoint(source, source, "Magnitude", "2:4", force=True)


@pytest.mark.parametrize(
    "file", ["block-00002.safetensors", "state.json", "inputs-1.safetensors", "sparsity.json", "report.json"]
)
def test_a_full_disk_is_one_clear_line_and_leaves_what_was_there(
    file: str, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer)
    gossamer.prune_checkpoint(source, tmp_path / "out", "Magnitude", "4:8")
    before = tensors(tmp_path / "out")
    fsync, replace = os.fsync, os.replace

    def full(a: Any, b: Any) -> None:
        if Path(b).name == file:
            raise OSError(28, "No space left on device")
        replace(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GossamerError, match="No space left on device; what was there is unchanged"):
        gossamer.prune_checkpoint(source, tmp_path / "out", "Wanda", "2:4", force=True, **TEXT)
    assert os.fsync is fsync
    after = tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.setattr(os, "replace", replace)
    gossamer.prune_checkpoint(source, tmp_path / "out", "Wanda", "2:4", force=True, **TEXT)
    assert not any(torch.equal(before[n], t) for n, t in tensors(tmp_path / "out").items() if "mlp" in n)


def test_a_nan_weight_is_named_and_nothing_is_published(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = causal("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with quiet():
        model.save_pretrained(tmp_path / "in")
        tiny_tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(GossamerError, match=r"layers.1.mlp.up_proj.weight: 1 of 2048 weights are NaN"):
        gossamer.prune_checkpoint(tmp_path / "in", tmp_path / "out", "SparseGPT", "2:4", **TEXT)
    assert not (tmp_path / "out").exists()


def test_tied_heads_are_stored_once(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = saved("llama", tmp_path / "in", tiny_tokenizer, tie_word_embeddings=True)
    gossamer.prune_checkpoint(source, tmp_path / "out", "Wanda", "2:4", **TEXT)
    assert tensors(source).keys() == tensors(tmp_path / "out").keys()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
