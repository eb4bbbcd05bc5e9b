"""The commands that train: what they print, what they leave, and what a mistake leaves: one line and nothing."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gossamer
from tests.test_cli import bright, process, run  # noqa: F401 (fixtures)

SMALL = ["--seqlen", "16", "--steps", "4", "--batch", "2"]


@pytest.fixture
def pruned(tiny_dir: Path, tmp_path: Path) -> Path:
    gossamer.prune_checkpoint(tiny_dir, tmp_path / "pruned", "Magnitude", "2:4", name=str(tiny_dir))
    return tmp_path / "pruned"


def test_recover_trains_and_keeps_the_zeros(run: Any, pruned: Path, bright: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    done = run(
        "recover", pruned, "--data", bright, *SMALL, "--eval-data", bright, "--windows", 2, "--eval-seqlen", 16, "--out", out
    )
    assert done.status == 0, done.err
    assert "Full 2:4: 14 weights" in done.out
    assert re.search(r"perplexity \d+\.\d\d → \d+\.\d\d, dense \d+\.\d\d", done.out)
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (pruned, out))
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    page = run("report", out / "report.json", "-o", tmp_path / "page.html")
    assert page.status == 0, page.err
    assert "Magnitude → Full" in (tmp_path / "page.html").read_text()


def test_the_command_in_the_report_does_the_same_again(run: Any, pruned: Path, bright: Path, tmp_path: Path) -> None:  # noqa: F811
    assert run("recover", pruned, "--data", bright, *SMALL, "--out", tmp_path / "one", "--quiet").status == 0
    words = shlex.split(json.loads((tmp_path / "one" / "report.json").read_text())["recipe"]["command"])
    assert words[0] == "gossamer"
    words[words.index("--out") + 1] = str(tmp_path / "two")
    assert run(*words[1:]).status == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "Ful"], "unknown method 'Ful'; did you mean Full?"),
        (["--loss", "l"], "unknown loss 'l'"),
        (["--teacher", "nowhere/"], "nowhere"),
        (["--windows", "2"], "--windows are of --eval-data, and there is none"),
        (["--steps", "0"], "steps is at least 1"),
        (["--device", "nope"], "the device 'nope' cannot be used here"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line(run: Any, pruned: Path, bright: Path, tmp_path: Path, words: list[str], told: str) -> None:  # noqa: F811
    done = run("recover", pruned, "--data", bright, *SMALL, *words, "--out", tmp_path / "out")
    assert done.status == 2
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_goes_through_a_recipe_and_draws_it(run: Any, tiny_dir: Path, bright: Path, tmp_path: Path) -> None:  # noqa: F811
    windows = {"data": str(bright), "seqlen": 16}
    steps = [
        {"prune": {"method": "Magnitude", "pattern": "2:4"}},
        {"recover": {**windows, "steps": 3, "batch": 2}},
        {"evaluate": {**windows, "windows": 2}},
    ]
    (tmp_path / "recipe.json").write_text(json.dumps({"model": str(tiny_dir), "steps": steps}))
    done = run("run", tmp_path / "recipe.json", "--out", tmp_path / "made")
    assert done.status == 0, done.err
    assert "Magnitude → Full" in done.out
    assert "Loss in training" in (tmp_path / "made" / "index.html").read_text()
    again = run("run", tmp_path / "recipe.json", "--out", tmp_path / "made")
    assert again.err.count("kept from the run before") == 3
    (tmp_path / "recipe.json").write_text("{}")
    wrong = run("run", tmp_path / "recipe.json", "--out", tmp_path / "made")
    assert wrong.status == 2
    assert "a recipe is an object" in wrong.err


def test_the_bar_shows_the_loss_and_the_zeros(pruned: Path, bright: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    shown: list[str] = []
    monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda self, text, **_: shown.append(text))
    gossamer.recover(pruned, tmp_path / "out", data=bright, steps=3, batch=2, seqlen=16, progress=True)
    assert len(shown) == 3
    assert re.match(r"loss \d+\.\d{3}, task \d+\.\d{3}, .*50\.00% zeros held$", shown[0])
