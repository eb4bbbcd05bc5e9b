"""Atomic writes: the old content or the new, whatever fails."""

import errno
import os
import sys
from pathlib import Path

import pytest

from gossamer.core import atomic
from gossamer.core.errors import GossamerError


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_write_text_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    atomic.write_text(path, "één")
    atomic.write_text(path, "twee")
    assert path.read_text(encoding="utf-8") == "twee"
    assert names(path.parent) == ["b.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        GossamerError, match=r"cannot write .*report\.json: No space left on device; what was there is unchanged"
    ):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_a_disk_that_fills_midway_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            full()

    with pytest.raises(GossamerError, match="No space left"):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.safetensors"]


def test_any_other_failure_passes_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write() -> None:
        with atomic.replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_path_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(GossamerError, match="cannot write"):
        atomic.write_text(tmp_path / "file" / "below", "new")
    with pytest.raises(GossamerError, match="cannot write"):
        atomic.write_text(tmp_path, "new")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_publish_swaps_folders(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    target = tmp_path / "out"
    atomic.publish(folder(tmp_path / "first", "one"), target)
    assert (target / "file").read_text() == "one"
    atomic.publish(folder(tmp_path / "second", "two"), target)
    assert (target / "file").read_text() == "two"
    assert names(tmp_path) == ["out"], "what stood there, and the finished folder's own name, are gone"


@pytest.mark.skipif(sys.platform != "linux", reason="one system call on Linux only")
def test_publish_is_one_step_on_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder(tmp_path / "out", "old")
    finished = folder(tmp_path / "new", "new")
    monkeypatch.setattr(os, "rename", full)
    try:
        atomic.publish(finished, target)
    except GossamerError:
        pytest.skip("this file system cannot exchange two folders")
    assert (target / "file").read_text() == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_publish_that_fails_leaves_what_was_there(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, finished = folder(tmp_path / "out", "old"), folder(tmp_path / "new", "new")
    rename, calls = os.rename, []

    def failing_rename(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == failing:
            full()
        rename(a, b)

    monkeypatch.setattr(sys, "platform", "elsewhere")
    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(GossamerError, match="No space left on device; what was there is unchanged"):
        atomic.publish(finished, target)
    assert (target / "file").read_text() == "old"
    assert (finished / "file").read_text() == "new"
    assert names(tmp_path) == ["new", "out"]


def test_publish_into_a_place_that_cannot_be(tmp_path: Path) -> None:
    finished = folder(tmp_path / "new", "new")
    with pytest.raises(GossamerError, match="cannot write"):
        atomic.publish(finished, tmp_path / "missing" / "out")
    assert (finished / "file").read_text() == "new"
