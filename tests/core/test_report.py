"""Reports: JSON and back, totals by hand."""

import json
import os
from pathlib import Path

import pytest

from gossamer.core.errors import GossamerError
from gossamer.core.report import Report, environment, read_json


@pytest.fixture
def report() -> Report:
    return Report(
        kind="prune",
        recipe={"method": "SparseGPT(damp=0.02)", "pattern": "2:4", "sparsity": None, "seed": 0},
        model={"name": "tiny", "parameters": 100, "dtype": "bfloat16", "itemsize": 2},
        weights=[
            {"name": "layers.0.q", "shape": [3, 4], "sparsity": 0.5, "nnz": 6, "damp": 0.02},
            {"name": "layers.0.experts", "shape": [2, 3, 3], "sparsity": 0.5, "nnz": 9},
        ],
        seconds={"total": 1.25, "calibrate": 1.0},
        peak_bytes={"resident": 1 << 40},
        evaluation={"perplexity": 12.5, "tokens": 4096, "seqlen": 128},
    )


def test_json_and_back(report: Report, tmp_path: Path) -> None:
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    report.save(tmp_path / "deep" / "report.json")
    assert Report.load(tmp_path / "deep" / "report.json") == report
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.json"], "no temporary file is left"
    written = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert written["format"] == 1
    assert written["totals"] == report.totals


def test_totals_by_hand(report: Report) -> None:
    assert report.totals == {
        "weights": 2,
        "entries": 30,
        "nnz": 15,
        "sparsity": 0.5,
        "bytes_dense": 60,
        "bytes_bitmask": 34,  # 15 values of 2 bytes, 30 bits
    }
    assert Report("prune", {}, {}, []).totals["sparsity"] == 0.0
    assert str(report) == "SparseGPT(damp=0.02) 2:4: 2 weights, 15 of 30 entries kept, sparsity 0.5000, 1.2 s"


def test_the_environment_is_plain_json() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"]
    assert found["gossamer"]


def test_saving_replaces_at_once(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def killed(*_: object) -> None:
        assert path.read_text() == "old", "the new text must not be seen before it is whole"
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            report.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]
    report.save(path)
    assert Report.load(path) == report


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "report",
        None,
        {"format": 1},
        {"format": 2, "kind": "prune", "recipe": {}, "model": {}, "weights": []},
        {"format": 1, "recipe": {}},
        {"format": 1, "kind": "prune", "recipe": {}, "model": {}, "weights": [], "extra": 1},
    ],
)
def test_other_json_is_not_a_report(value: object, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(value))
    with pytest.raises(GossamerError, match="not a gossamer report of format 1"):
        Report.load(path)


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match=r"cannot read .*missing\.json: No such file"):
        Report.load(tmp_path / "missing.json")
    with pytest.raises(GossamerError, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path)
    (tmp_path / "broken.json").write_text('{"format": 1,')
    with pytest.raises(GossamerError, match=r"broken\.json is not JSON: "):
        read_json(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GossamerError, match=r"binary\.json is not JSON: "):
        read_json(tmp_path / "binary.json")
