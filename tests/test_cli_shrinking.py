"""The command that removes structure: what it says before it starts, what it writes, and a mistake is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

import gossamer
from tests.structures.methods import operations
from tests.test_cli import SMALL, bright, run, tree

__all__ = ["bright", "run"]  # fixtures


@pytest.mark.parametrize(
    ("method", "told"), [("Depth", "plain transformers opens it"), ("CFSP(a=5000.0)", "after `import gossamer.hf`")]
)
def test_it_says_what_opens_the_result_before_it_starts(
    method: str, told: str, run: Any, tiny_dir: Path, bright: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["shrink", tiny_dir, "--method", method, "--sparsity", "0.4", "--data", bright, *SMALL, "--out", out]
    done = run(*words)
    assert done.status == 0
    assert told in done.err
    assert told not in done.out
    assert f"wrote {out}; next: gossamer eval {out}" in done.out
    report = json.loads((out / "report.json").read_text())
    model = gossamer.load(out)
    assert report["structure"]["parameters"][1] == sum(p.numel() for p in model.parameters())
    assert report["structure"]["plain"] == (method == "Depth")
    assert report["recipe"]["command"].startswith(f"gossamer shrink {tiny_dir} --method ")
    assert gossamer.Report.load(out / "report.json").structure == report["structure"]
    assert run("eval", out, "--data", bright, "--seqlen", "16", "--windows", "2").status == 0


def test_a_speedup_is_asked_for_and_told(
    run: Any, tiny_dir: Path, bright: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.sites._latency.seconds", operations)
    out, goal = tmp_path / "out", ["--speedup", "1.2", "--at", "1x16"]
    done = run("shrink", tiny_dir, "--method", "ZipLM", *goal, "--data", bright, *SMALL, "--out", out)
    assert done.status == 0, done.err
    report = json.loads((out / "report.json").read_text())
    latency = report["structure"]["latency"]
    assert latency["at"] == [1, 16]
    assert latency["speedup"] == [1.2, latency["seconds"][0] / latency["seconds"][1]]
    assert f" --method ZipLM {' '.join(goal)} --data " in report["recipe"]["command"]
    assert "as fast (1.20 asked for)" in done.out
    assert run("report", out / "report.json", "--output", tmp_path / "page.html").status == 0


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (["--method", "Dept", "--sparsity", "0.4"], "unknown structure 'Dept'; did you mean Depth"),
        (["--method", "Depth", "--sparsity", "1.4"], "sparsity is the fraction of the blocks' parameters that goes"),
        (["--method", "Depth", "--sparsity", "0.01"], "removes whole blocks: of 2, a sparsity of 0.01 is 0"),
        (
            ["--method", "CFSP", "--sparsity", "0.95"],
            "parameters in channels at most 10,752 can go",
        ),
        (["--method", "CFSP(multiple=0)", "--sparsity", "0.2"], "CFSP wants multiple >= 1"),
        (["--method", "CFSP", "--speedup", "1.2"], "takes a sparsity, no speed-up; what goes by time is ZipLM"),
        (["--method", "ZipLM", "--speedup", "0.5"], "a speed-up is how many times as fast"),
        (["--method", "ZipLM", "--speedup", "1.5", "--at", "512"], "--at is BATCHxTOKENS, such as 1x512; got '512'"),
        (["--method", "ZipLM", "--speedup", "900", "--at", "1x8"], "a speed-up of 900.00 was asked for"),
        (["--method", "CFSP", "--sparsity", "0.2", "--at", "1x8"], "--at is the pass that --speedup is of"),
        (["--method", "ZipLM"], "either sparsity or speedup"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_on_disk(
    how: list[str], told: str, run: Any, tiny_dir: Path, bright: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    done = run("shrink", tiny_dir, *how, "--data", bright, *SMALL, "--out", tmp_path / "out")
    assert done.status == 2
    assert told in done.err
    assert done.err.splitlines()[-1].startswith("gossamer: ")
    assert tree(tmp_path) == before
