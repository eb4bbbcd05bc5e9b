"""The table of measured products: what it asks for, what it keeps, and that it refuses to time a wrong product."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gossamer import NM, Block, Unstructured
from gossamer.core.errors import GossamerError
from gossamer.formats import Bitmask
from gossamer.timing import FORMATS, Product, Table, candidates, crowded, measure, of_others, rounded, seconds

CPU = torch.device("cpu")
SMALL = Product(32, 64, "float32", 1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.timing.ROTATE_BYTES", {"cpu": 1 << 12})


def test_sparsities_are_rounded_down() -> None:
    assert [rounded(s) for s in (0.0, 0.04, 0.05, 0.5, 0.548, 0.69997, 0.9989)] == [0.0, 0.0, 0.05, 0.5, 0.5, 0.7, 0.95]


def test_candidates_follow_from_pattern_and_device() -> None:
    assert candidates(None, CPU) == candidates(Unstructured(), CPU) == ["Bitmask"]
    assert candidates(NM(2, 4), CPU) == ["NM", "Bitmask"]
    assert candidates(Block(4, 1), torch.device("cuda")) == ["Block", "Bitmask", "Sliced", "Tiled"]


def test_turns_rotate() -> None:
    seen: list[int] = []
    seconds(seen.append, CPU, turns=4, repeats=30)
    assert seen[-30:] == [i % 4 for i in range(30)]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_measured(name: str) -> None:
    pattern = {"NM": "2:4", "Block": "4x1", "Grouped": "1x16"}.get(name, "Unstructured")
    found = measure(Product(32, 64, "bfloat16", 2, name, pattern, 0.5), CPU)
    assert found["seconds"] > 0
    assert found["kernel"] in ("avx512", "avx2", "portable")
    assert found["bytes"] > 0


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Bitmask.linear
    monkeypatch.setattr(Bitmask, "linear", lambda self, x, kernel="auto": right(self, x, kernel) * 1.01)
    with pytest.raises(GossamerError, match="more than rounding: not timed"):
        measure(Product(32, 64, "float32", 1, "Bitmask", "Unstructured", 0.5), CPU)


def test_entries_are_kept_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(path=tmp_path / "t.json")
    assert table.missing([SMALL, SMALL]) == [SMALL]
    found = table[SMALL]
    assert Table(path=tmp_path / "t.json")[SMALL] == found
    assert list(json.loads((tmp_path / "t.json").read_text())) == [table.key]
    monkeypatch.setattr("gossamer.timing.measure", lambda *_: pytest.fail("measured again"))
    again = Table(path=tmp_path / "t.json")
    assert again[SMALL] == found
    assert again.missing([SMALL]) == []
    assert again.forget() == 1
    assert Table(path=tmp_path / "t.json").missing([SMALL]) == [SMALL]


def test_another_kernel_than_would_run_now_is_measured_again(tmp_path: Path) -> None:
    table = Table(path=tmp_path / "t.json")
    packed = replace(SMALL, format="Bitmask", sparsity=0.5)
    assert table[packed]["kernel"] in ("avx512", "avx2", "portable")
    assert table[SMALL]["kernel"] == "torch"
    text = (tmp_path / "t.json").read_text()
    (tmp_path / "t.json").write_text(text.replace(f'"{table[packed]["kernel"]}"', '"older"'))
    assert Table(path=tmp_path / "t.json").missing([SMALL, packed]) == [packed]


def test_what_is_measured_beside_other_work_does_not_decide_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.timing.crowded", lambda others, wall: True)
    table = Table(path=tmp_path / "t.json")
    assert table[SMALL]["beside"]
    assert table.missing([SMALL]) == []  # for this table it has been measured
    assert Table(path=tmp_path / "t.json").missing([SMALL]) == [SMALL]
    monkeypatch.setattr("gossamer.timing.crowded", lambda others, wall: False)
    table = Table(path=tmp_path / "t.json")
    assert "beside" not in table[SMALL]
    assert Table(path=tmp_path / "t.json").missing([SMALL]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the count of other processes' time is Linux's")
def test_other_processes_are_seen_and_our_own_work_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(seconds: float) -> float:
        begin, before = time.perf_counter(), of_others()
        while time.perf_counter() - begin < seconds:
            pass
        return (of_others() - before) / (time.perf_counter() - begin)

    alone = share(0.5)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.3)
        beside = share(0.5)
        busy.kill()
    assert beside > alone + 0.3


def test_cores_to_spare_are_no_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: torch.get_num_threads() + 2)
    assert not crowded(2.0, 1.0)
    assert crowded(2.5, 1.0)
    assert not crowded(0.09, 0.01)  # too little to be told from the count's steps


def test_other_devices_entries_stay(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"another machine": {"x": {"seconds": 1.0}}}))
    table = Table(path=path)
    table[SMALL]
    assert set(json.loads(path.read_text())) == {"another machine", table.key}
    table.forget()
    assert json.loads(path.read_text()) == {"another machine": {"x": {"seconds": 1.0}}}


def test_a_dtype_that_is_not_supported() -> None:
    with pytest.raises(GossamerError, match="cannot time float64"):
        measure(Product(4, 4, "float64", 1), CPU)
