"""The examples run as they are, on models made in a moment."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def roomy_dir(tiny_dir: Path) -> Path:
    """A tiny model whose context holds a window of the default length."""
    config = json.loads((tiny_dir / "config.json").read_text())
    (tiny_dir / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return tiny_dir


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_no_example_is_long() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 60 for path in EXAMPLES.glob("*.py"))


def test_prune_in_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("prune_in_python.py", monkeypatch)
    entries = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert f"{entries // 2:,} of {entries:,} entries of 14 weights are zero" in capsys.readouterr().out


def test_prune_in_python_takes_a_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], roomy_dir: Path, tmp_path: Path
) -> None:
    run("prune_in_python.py", monkeypatch, roomy_dir, tmp_path / "out")
    assert "of 14 weights are zero" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["sparsity"] == 0.5


def test_prune_larger_than_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("prune_larger_than_memory.py", monkeypatch)
    assert "model.safetensors.index.json" in capsys.readouterr().out


def test_prune_larger_than_memory_takes_a_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], roomy_dir: Path, tmp_path: Path
) -> None:
    run("prune_larger_than_memory.py", monkeypatch, roomy_dir, tmp_path / "out")
    assert "SparseGPT 2:4: 14 weights" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.json").is_file()


def test_pack_and_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    run("pack_and_generate.py", monkeypatch)
    assert "writes what the dense one does: True" in capsys.readouterr().out
    run("pack_and_generate.py", monkeypatch, tiny_dir, tmp_path / "out")
    assert "writes what the dense one does: True" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("name", ["finetune_plain.py", "finetune_trainer.py"])
def test_finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 30
    run(name, monkeypatch)
    entries = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert f"hold: 14 weights, {entries // 2:,} of {entries:,} entries kept" in capsys.readouterr().out


def test_finetune_adapter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("finetune_adapter.py", monkeypatch)
    assert "LlamaForCausalLM with the same zeros: True" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # TRL has warnings of its own, by the release
def test_finetune_trl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    (tmp_path / "prose.txt").write_text("The spider spins a thin thread.\n" * 64)
    run("finetune_trl.py", monkeypatch, tiny_dir, tmp_path / "prose.txt")
    assert "hold: 14 weights" in capsys.readouterr().out
    assert len((EXAMPLES / "finetune_trl.py").read_text(encoding="utf-8").splitlines()) <= 30
