"""A shrinking that is stopped goes on after its last step, to the same bits."""

import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.sites._run import Run
from gossamer.sites._shrinking import shrink_checkpoint

TYR = "Tyr(rounds=2, levels=1, generations=2, offspring=2, survivors=(1,), tokens=(16,))"
STEPS = {"ZipLM": 4, "AdaptPruner(step=0.1)": 4, TYR: 2 * (4 + 1)}  # two blocks, heads and channels; rounds


class Steps:
    """Counts the steps that are computed, and stops before one more than ``most``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: list[str] = []
        self.most = 1000
        once = Run.once

        def counting(run: Run, step: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            def counted() -> dict[str, Tensor]:
                found = compute()
                if len(self.computed) == self.most:
                    self.full()
                self.computed.append(step)
                return found

            return once(run, step, counted)

        monkeypatch.setattr(Run, "once", counting)

    def full(self) -> None:
        """What happens then."""
        raise KeyboardInterrupt


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. The spider spins a thin thread; gossamer is light and strong.\n" for i in range(80)))
    return path


def weights(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("method", STEPS, ids=lambda method: method.partition("(")[0])
@pytest.mark.parametrize("after", [1, 3, "last"])
def test_to_the_same_bits(method: str, after: Any, steps: Steps, tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    how = {"sparsity": 0.2, "data": text, "seqlen": 16, "samples": 8, "name": "tiny"}
    told: list[str] = []
    whole = shrink_checkpoint(tiny_dir, tmp_path / "whole", method, **how, say=told.append)
    assert told == []
    assert len(set(steps.computed)) == len(steps.computed) == STEPS[method], "each step has a name of its own"
    steps.most = len(steps.computed) - 1 if after == "last" else after
    steps.computed.clear()
    with pytest.raises(KeyboardInterrupt):
        shrink_checkpoint(tiny_dir, tmp_path / "out", method, **how)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").exists()
    steps.most = 1000
    done = len(steps.computed)
    report = shrink_checkpoint(tiny_dir, tmp_path / "out", method, **how, say=told.append)
    assert told == [f"goes on where the run before was stopped (steps done: {done})"]
    assert len(steps.computed) == STEPS[method], "no step was taken twice"
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert report.blocks == whole.blocks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "tiny", "whole"]


def test_one_that_was_stopped_after_all_its_steps(
    steps: Steps, tiny_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    how = {"sparsity": 0.2, "data": text, "seqlen": 16, "samples": 8, "force": True}
    for method in STEPS:
        shrink_checkpoint(tiny_dir, tmp_path / "whole", method, **how)
        with monkeypatch.context() as patch:
            patch.setattr("gossamer.sites._shrinking.save", stop)
            with pytest.raises(KeyboardInterrupt):
                shrink_checkpoint(tiny_dir, tmp_path / "out", method, **how)
        steps.computed.clear()
        shrink_checkpoint(tiny_dir, tmp_path / "out", method, **how)
        assert steps.computed == []
        assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_another_text_starts_over(steps: Steps, tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    how = {"sparsity": 0.2, "data": text, "seqlen": 16, "samples": 8}
    steps.most = 2
    with pytest.raises(KeyboardInterrupt):
        shrink_checkpoint(tiny_dir, tmp_path / "out", "ZipLM", **how)
    steps.most = 1000
    text.write_text(text.read_text().swapcase())
    shrink_checkpoint(tiny_dir, tmp_path / "out", "ZipLM", **how)
    assert len(steps.computed) == 2 + 4, "the text is another"


def test_a_slip_leaves_what_was_found(steps: Steps, tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    how = {"sparsity": 0.2, "data": text, "seqlen": 16, "samples": 8}
    steps.most = 2
    with pytest.raises(KeyboardInterrupt):
        shrink_checkpoint(tiny_dir, tmp_path / "out", "ZipLM", **how)
    for slip in ({"data": None}, {"data": tmp_path / "none.txt"}, {"samples": 100_000}, {"seqlen": 100_000}, {"sparsity": 2}):
        with pytest.raises(GossamerError) as raised:
            shrink_checkpoint(tiny_dir, tmp_path / "out", "ZipLM", **how | slip)
        assert "\n" not in str(raised.value)
    steps.most = 1000
    shrink_checkpoint(tiny_dir, tmp_path / "out", "ZipLM", **how)
    assert len(steps.computed) == 4


def test_a_full_disk_keeps_what_was_found_and_names_the_output(
    steps: Steps, tiny_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = torch.from_file

    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def put(path: str, **how: Any) -> Tensor:
        if Path(path).exists():
            return read(path, **how)
        raise RuntimeError("unable to resize file: No space left on device")

    how = {"sparsity": 0.2, "data": text, "seqlen": 16, "samples": 8, "force": True}
    for method, place, full in (("ZipLM", "gossamer.sites._run.save_file", save), (TYR, "torch.from_file", put)):
        steps.computed.clear()
        with monkeypatch.context() as patch:
            steps.most = 2
            patch.setattr(steps, "full", partial(patch.setattr, place, full))
            with pytest.raises(GossamerError, match="space left") as raised:
                shrink_checkpoint(tiny_dir, tmp_path / "out", method, **how)
        assert "partial" not in str(raised.value)
        kept = json.loads((tmp_path / ".out.partial" / "state.json").read_text())["steps"]
        assert len(kept) >= 2
        steps.most = 1000
        steps.computed.clear()
        shrink_checkpoint(tiny_dir, tmp_path / "out", method, **how)
        assert len(steps.computed) == STEPS[method] - len(kept)


def test_a_mistake_leaves_nothing(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    how = {"sparsity": 0.2, "data": text, "seqlen": 16, "samples": 8}
    with pytest.raises(GossamerError, match="ends at"):
        shrink_checkpoint(tiny_dir, tmp_path / "more", "ZipLM", **how | {"sparsity": 0.99})
    assert sorted(path.name for path in tmp_path.iterdir() if "more" in path.name) == []
