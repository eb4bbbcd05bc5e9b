"""What an interrupted run leaves behind: finished shards, the next block's inputs, and where to go on."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core.atomic import cannot_write, lock, publish, replacing, write_text
from gossamer.core.errors import GossamerError
from gossamer.core.report import Report, environment, read_json
from gossamer.models import INDEX
from gossamer.sites._packed import Packed, checksum

_OURS = ("sparsity.json", "report.json")
REST_SHARD_BYTES = 2**31


class Run:
    """What a run has finished so far, in a folder beside its output: shards, the next block's inputs, and state.json.

    As a context it holds the folder for itself, and on leaving removes it, unless a block is finished and the run can go on:
    after a kill or a full disk, not after a mistake, which would only be made again.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = Path(os.path.realpath(out))
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        versions = [version("transformers"), *(environment()[k] for k in ("gossamer", "torch", "threads", "accelerator"))]
        digest = hashlib.sha256(json.dumps([identity, versions], sort_keys=True, default=str).encode()).hexdigest()
        self.state: dict[str, Any] = {"identity": digest, "done": 0, "rows": [], "seconds": 0.0, "shards": {}}
        self._started = time.perf_counter()

    def __enter__(self) -> "Run":
        self._made = [parent for parent in self.folder.parents if not parent.exists()]
        try:
            self._lock = lock(self.folder, self.out)
            if (self.folder / "state.json").exists():
                kept = read_json(self.folder / "state.json")
                if kept.get("identity") == self.state["identity"]:
                    self.state = kept
                    return self
            for remains in self.folder.iterdir():  # another command's
                if remains.is_dir():
                    shutil.rmtree(remains)
                elif remains.name != "lock":
                    remains.unlink()
        except OSError as error:
            raise cannot_write(self.out, error) from error
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        cause = error.__cause__ if isinstance(error, GossamerError) else None
        mistake = isinstance(error, GossamerError) and not isinstance(cause, OSError)
        if error is None or mistake or not (self.folder / "state.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            if error is not None:
                with contextlib.suppress(OSError):  # in use by now
                    for parent in self._made:
                        parent.rmdir()
        self._lock.close()
        if isinstance(cause, OSError) and str(self.folder) in str(error):
            raise cannot_write(self.out, cause) from cause  # what the user asked for, not where we work

    def scratch(self) -> Path:
        """Return an empty folder for converted weights."""
        folder = self.folder / "scratch"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            raise cannot_write(self.out, error) from error
        return folder

    def inputs(self, lanes: int) -> list[Any]:
        """Return what each lane had put out of the last finished block; None for each before the first."""
        if not self.state["done"]:
            return [None] * lanes
        with safe_open(self.folder / f"inputs-{self.state['done']}.safetensors", framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
        return [_unflatten(found, lane, self.state["output_lengths"][lane]) for lane in range(lanes)]

    def finish_block(self, position: int, state: dict[str, Tensor], outputs: Sequence[Any]) -> None:
        """Write a block's shard and the next block's inputs, then say so in state.json: in that order, each atomically."""
        done = position + 1
        self._shard(f"block-{done:05d}", state)
        if outputs:
            flat = {f"{lane}.{i}": t for lane, out in enumerate(outputs) for i, t in enumerate(_parts(out)) if t is not None}
            _save(self.folder / f"inputs-{done}.safetensors", flat)
            self.state["output_lengths"] = [len(out) if isinstance(out, tuple) else None for out in outputs]
        self.state |= {"done": done, "seconds": self.seconds()}
        self.start()
        write_text(self.folder / "state.json", json.dumps(self.state))
        (self.folder / f"inputs-{position}.safetensors").unlink(missing_ok=True)

    def once(self, step: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what a step comes to, a file in the folder: of the run before, or computed now and kept for the next."""
        path, done = self.folder / f"{step}.safetensors", self.state.setdefault("steps", [])
        if step in done:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
        found = {name: tensor.cpu() for name, tensor in compute().items()}
        _save(path, found)
        done.append(step)
        self.keep()
        return found

    def keep(self) -> None:
        """Let what is known so far outlast a kill."""
        write_text(self.folder / "state.json", json.dumps(self.state))

    def add_packed(self, said: Packed) -> None:
        """Take down what the config is to say of a block of a packed result, or of what is outside the blocks."""
        kept = self.state.setdefault("packed", Packed({}, {}).to_json())
        for key in ("weights", "crc32"):
            kept[key] |= said.to_json()[key]

    def complete(self, source: Path, rest: dict[str, Tensor], report: Report) -> None:
        """Write what is outside the blocks, name the shards, copy configuration and tokenizer, and publish the directory."""
        try:
            if "packed" in self.state:
                self.add_packed(Packed({}, {name: checksum(tensor) for name, tensor in rest.items()}))
            part: dict[str, Tensor] = {}
            parts = [part]
            for name, tensor in rest.items():
                if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > REST_SHARD_BYTES:
                    parts.append(part := {})
                part[name] = tensor
            for number, part in enumerate(parts):
                self._shard(f"rest-{number:05d}", part)
            finished = self.folder / "finished"
            shutil.rmtree(finished, ignore_errors=True)
            finished.mkdir()
            weight_map: dict[str, str] = {}
            total = 0
            for number, (shard, names) in enumerate(sorted(self.state["shards"].items()), 1):
                file = f"model-{number:05d}-of-{len(self.state['shards']):05d}.safetensors"
                _place(self.folder / f"{shard}.safetensors", finished / file)
                weight_map |= dict.fromkeys(names["names"], file)
                total += names["bytes"]
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(finished / INDEX, json.dumps(index, indent=1) + "\n")
            for kept in source.iterdir():
                if kept.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and kept.name not in (INDEX, *_OURS):
                    shutil.copyfile(kept, finished / kept.name)
            if "packed" in self.state:
                config = read_json(finished / "config.json") | {"quantization_config": self.state["packed"]}
                write_text(finished / "config.json", json.dumps(config, indent=2) + "\n")
            write_sparsity(finished, report.weights)
            report.save(finished / "report.json")
            publish(finished, self.out)
        except OSError as error:
            raise cannot_write(self.out, error) from error

    def start(self) -> float:
        """Start the clock of the blocks, and return its time."""
        self._started = time.perf_counter()
        return self._started

    def seconds(self) -> float:
        """Return the time spent on the blocks so far, that of killed runs up to their last finished block included."""
        return float(self.state["seconds"]) + time.perf_counter() - self._started

    def _shard(self, name: str, state: dict[str, Tensor]) -> None:
        _save(self.folder / f"{name}.safetensors", state)
        self.state["shards"][name] = {"names": sorted(state), "bytes": sum(t.nbytes for t in state.values())}


def write_sparsity(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write sparsity.json: the zeros of each pruned weight."""
    kept = {r["name"]: {k: r[k] for k in ("shape", "sparsity", "nnz")} for r in rows}
    write_text(folder / "sparsity.json", json.dumps({"format": 1, "weights": kept}, indent=1) + "\n")


def _place(file: Path, at: Path) -> None:
    """Give a finished file a second name, so that a run killed while publishing can still go on; copy where links fail."""
    try:
        at.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, at)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError

    with replacing(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise OSError(str(error)) from error


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _unflatten(found: dict[str, Tensor], lane: int, length: int | None) -> Any:
    if length is None:
        return found[f"{lane}.0"]
    return tuple(found.get(f"{lane}.{i}") for i in range(length))
