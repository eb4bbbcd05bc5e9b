"""A sweep: the knee by hand, the grid read, single weights pruned alone, on after a stop, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer import compare
from gossamer.cli._shared import fractions
from gossamer.core.errors import GossamerError
from gossamer.html import page
from gossamer.sweeping import expanded, knee, knees, sweep
from tests.test_cli import run as run  # the fixture that calls the command line

SMALL = {"seqlen": 16, "samples": 4, "windows": 4}


def test_the_knee_lies_farthest_below_the_chord() -> None:
    # ln p = 0, 0, 1, 4 at 0, .2, .6, .8: the chord is 5 s, the points lie 0, 1, 2, 0 below
    e = 2.718281828459045
    assert knee([(0.8, e**4), (0.0, 1.0), (0.6, e), (0.2, 1.0)]) == 0.6
    assert knee([(0.0, 1.0), (0.2, 1.0), (0.6, e), (0.8, e**4), (0.9, None), (0.95, float("inf"))]) == 0.6
    assert knee([(0.0, 1.0), (0.5, e**3), (0.9, e**3.1)]) is None, "it rises at once and flattens"
    assert knee([(0.0, 1.0), (0.5, None), (0.9, 2.0)]) is None


def test_a_grid_and_a_list_are_read() -> None:
    assert fractions("0.1:0.9:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert fractions("0.5, 0.6:0.7:0.05,0.5") == [0.5, 0.6, 0.65, 0.7]
    assert fractions("0.1:0.4:0.2") == [0.1, 0.3]
    for wrong in ("a", "0.1:0.9", "0.9:0.1:0.1", "0.1:0.9:0", "1:2:3:4"):
        with pytest.raises(GossamerError, match="first:last:step"):
            fractions(wrong)


def test_n_of_m_is_written_out() -> None:
    assert expanded(["N:2", "Unstructured", "2:4"]) == ["1:2", "Unstructured", "2:4"]
    assert expanded(["N:8"])[0] == "7:8"


def test_a_sweep_is_a_comparison_with_more(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[Any] = []
    original = compare.prune
    monkeypatch.setattr(compare, "prune", lambda *a, **k: (pruned.append(k["targets"]), original(*a, **k))[1])
    asked = [tiny_dir, ["Magnitude"], ["Unstructured", "N:4"], [0.3, 0.6, 0.9], tmp_path / "out"]
    document = sweep(*asked, layers=0.6, **SMALL)
    assert document["kind"] == "compare"
    assert len(document["runs"]) == 3 + 3
    assert [(k["method"], k["pattern"]) for k in document["knees"]] == [
        ("Magnitude", "Unstructured(per='tensor')"),
        ("Magnitude", "N:4"),
    ]
    assert len(document["layers"]) == 14
    assert {row["targets"] for row in document["layers"]} == set(pruned) - {None}
    for row in document["layers"]:
        assert row["sparsity"] == pytest.approx(0.6, abs=0.001)
        assert row["perplexity"] > 1
        assert row["pattern"] == "Unstructured(per='tensor')"
    assert document == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert document["knees"] == knees(document)

    before = len(pruned)
    finer = sweep(*asked[:3], [0.3, 0.5, 0.6, 0.9], asked[4], layers=0.6, **SMALL)
    assert len(pruned) == before + 1, "only the new point is run"
    assert finer["layers"] == document["layers"]
    blocks = sweep(*asked, layers=0.6, by="block", **SMALL)
    assert [row["block"] for row in blocks["layers"]] == [0, 1]
    assert len(pruned) == before + 3
    drawn = page([finer])
    assert 'data-chart="sensitivity"' in drawn
    assert "mlp.down_proj" in drawn
    assert 'data-chart="sensitivity"' in page([blocks])
    assert 'data-chart="sensitivity"' not in page([{k: v for k, v in finer.items() if k != "layers"}])


def test_sweep_on_the_command_line(run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    words = ["sweep", tiny_dir, "--method", "Magnitude", "--sparsity", "0.3:0.9:0.3", "--seqlen", "16", "--windows", "4"]
    done = run(*words, "--layers", "0.5", "--by", "block", "--out", tmp_path / "s", "--json", tmp_path / "s.json")
    assert done.status == 0
    assert "knee" in done.out
    assert "block 1" in done.out
    assert json.loads((tmp_path / "s.json").read_text())["knees"]
    assert (tmp_path / "s" / "index.html").is_file()
    again = run(*words, "--out", tmp_path / "s")
    assert again.err.count("kept from the run before") == 4


HALF = ["--pattern", "Unstructured", "--sparsity", "0.5"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prune", "--method", "Wanda", "--pattern", "2:4"], "Wanda needs calibration data"),
        (["prune", "--method", "SparseGPT", "--pattern", "4x1", "--sparsity", "0.5"], "not for 4x1"),
        (["prune", "--method", "SparseGPT", *HALF, "--allocate", "global_", "--data", "builtin"], "by(Wanda, global_)"),
        (["prune", "--method", "Magnitude", *HALF, "--allocate", "ecoflap"], "allocate=ecoflap needs calibration data"),
        (["prune", "--method", "SynFlow", *HALF, "--allocate", "by(Wanda, owl)"], "needs calibration data"),
        (["compare", "--methods", "SparseGPT", "--pattern", "4x1"], "not for 4x1"),
        (["sweep", "--method", "SparseGPT", "--pattern", "4x1"], "not for 4x1"),
        (["sweep", "--sparsity", "0.9:0.1:0.1"], "first:last:step"),
        (["sweep", "--method", "Nobody"], "unknown method"),
        (["sweep", "--layers", "1.5"], "fraction of zeros"),
    ],
)
def test_a_slip_is_refused_before_a_model_is_looked_for(run: Any, tmp_path: Path, words: list[str], says: str) -> None:
    done = run(words[0], "nowhere/at-all", *words[1:], "--out", tmp_path / "out")
    assert done.status == 2
    assert says in done.err
    assert not (tmp_path / "out").exists()
