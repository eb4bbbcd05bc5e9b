"""The commands about packed models and speed: what they print and write, and that a mistake is one line and exit status 2."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gossamer
from gossamer import cli
from gossamer.models import causal_lm


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Call the command line in this process, with a cache and small rotations of its own."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gossamer.timing.ROTATE_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr("gossamer.timing.REPEATS", 3)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err  # type: ignore[return-value]

    return call


@pytest.fixture
def pruned(tiny_dir: Path, tmp_path: Path) -> Path:
    model = causal_lm(tiny_dir)
    report = gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.7)
    gossamer.save(model, tmp_path / "pruned", report=report)
    for file in tiny_dir.glob("tokenizer*"):
        (tmp_path / "pruned" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "pruned"


def test_bench_prints_and_writes(run: Any, pruned: Path, tmp_path: Path) -> None:
    asked = "--batch", "1,2", "--context", "8", "--prompt", "24", "--json", tmp_path / "b.json"
    status, out, _ = run("bench", pruned, *asked, "--quiet")
    assert status == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["kind"] == "bench"
    assert found["prefill"]["tokens"] == 24
    assert "prefill of 24" in out
    assert {r["sparsity"] for r in found["products"]} == {0.7}
    for word in ("byte limit", "faster from a sparsity of", "decode, batch 2", "prefill of", found["said"]):
        assert word in out


def test_bench_of_a_shape(run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    how = ["--pattern", "2:4", "--sparsity", "0.5", "--dtype", "float32", "--context", "8", "--json", tmp_path / "b.json"]
    assert run("bench", "--config", tiny_dir / "config.json", *how, "--quiet")[0] == 0
    rows = json.loads((tmp_path / "b.json").read_text())["products"]
    assert {(r["sparsity"], r["format"]) for r in rows} == {(0.5, "NM"), (0.5, "Bitmask")}


def test_plan_says_what_pays(run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    how = ["--sparsity", "0.5", "--dtype", "float32", "--json", tmp_path / "p.json", "--quiet"]
    status, out, _ = run("plan", tiny_dir / "config.json", *how)
    assert status == 0
    assert "does it pay here?" in out
    found = json.loads((tmp_path / "p.json").read_text())
    assert [(r["pattern"], r["sparsity"]) for r in found["rows"]] == [("Unstructured", 0.5), ("2:4", 0.5)]
    assert run("plan", tiny_dir, *how[:-3], "--quiet")[0] == 0


def test_timings_are_shown_and_forgotten(run: Any, pruned: Path) -> None:
    run("bench", pruned, "--context", "8", "--quiet")
    _, out, _ = run("timings")
    assert "Bitmask" in out
    assert "64x32" in out
    assert "forgot" in run("timings", "--forget")[1]
    assert ": 0 entries" in run("timings")[1]


def test_generate_writes_the_tokens_of_transformers(run: Any, pruned: Path) -> None:
    model, prompt = causal_lm(pruned), "The spider"
    words = gossamer.models.tokenizer(pruned)
    ids = words(prompt, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    status, out, err = run("generate", pruned, "--prompt", prompt, "--tokens", 8)
    assert status == 0
    assert out.strip() == words.decode(wanted, skip_special_tokens=True).strip().rstrip("\N{REPLACEMENT CHARACTER}")
    assert "8 tokens" in err
    assert run("generate", pruned, "--prompt", prompt, "--tokens", 8, "--pack", "--quiet")[1] == out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bench"], "bench wants a model, or --config"),
        (["bench", "{pruned}", "--config", "llama-1b"], "and not both"),
        (["bench", "{dense}"], "there is nothing to bench: the model has no zeros"),
        (["bench", "{pruned}", "--batch", "0"], "--batch wants positive numbers"),
        (["bench", "{pruned}", "--prompt", "0"], "'--prompt'"),
        (["bench", "{pruned}", "--dtype", "int8"], "--dtype is bfloat16, float16, float32"),
        (["bench", "{pruned}", "--device", "cuda"], "cannot be used here"),
        (["bench", "--config", "llama-9b"], "no configuration llama-9b"),
        (["plan", "{pruned}/nothing.json"], "does not exist"),
        (["plan", "llama-1b", "--sparsity", "1.5"], "sparsity is the fraction of zeros"),
        (["plan", "llama-1b", "--pattern", "2;4"], "cannot read the pattern"),
        (["generate", "{pruned}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{pruned}", "--prompt", "a", "--tokens", "0"], "--tokens is a positive number"),
        (["generate", "{pruned}", "--prompt", "a", "--tokens", "4000"], "over the model's context"),
        (["generate", "{dense}", "--prompt", "a", "--pack"], "there is nothing to pack"),
    ],
)
def test_a_mistake_is_one_line(run: Any, words: list[str], told: str, pruned: Path, tiny_dir: Path) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    status, _, err = run(*(w.format(pruned=pruned, dense=tiny_dir) for w in words), "--quiet")
    assert status == 2
    assert told in err
    assert err.startswith("gossamer: ")
    assert err.count("\n") == 1
