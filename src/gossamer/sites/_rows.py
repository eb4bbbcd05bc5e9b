"""What a report says of a weight, a model and a run."""

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.format import Format
from gossamer.core.stats import Stats
from gossamer.sites._walk import Target

_LIBC = ctypes.CDLL(None)


def row(target: Target) -> dict[str, Any]:
    """Return what is in a weight now: name, shape as stored, count of entries that are not zero."""
    w = target.parameter
    nnz = int(w.count_nonzero())
    return {
        "name": target.name,
        "shape": list(w.shape),
        "sparsity": 1 - nnz / w.numel(),
        "nnz": nnz,
        "block": target.block,
    }


def wrapped(target: Target, packed: Format) -> dict[str, Any]:
    """Return what is to be said of a weight that has become a product: the zeros of its core, and what it takes."""
    w, nnz = target.parameter, packed.nnz
    return {
        "sparsity": 1 - nnz / w.numel(),
        "nnz": nnz,
        "format": type(packed).__name__,
        "bytes": packed.bytes,
        "dense_bytes": w.nbytes,
    }


def told(stats: Sequence[Stats]) -> dict[str, Any]:
    """Return what calibration has to say of a weight: tokens seen, damping used, dead inputs."""
    told: dict[str, Any] = {}
    if tokens := [s.tokens for s in stats if s.tokens]:
        told["tokens"] = tokens[0] if len(stats) == 1 else [s.tokens for s in stats]
    if unseen := sum(s.white for s in stats):
        told["note"] = f"no calibration token reached {unseen} of {len(stats)}: ranked by magnitude"
    damping = [s.damping for s in stats if s.damping is not None]
    if damping:
        told["damp"] = max(damping)
    if dead := sum(s.dead for s in stats):
        told["dead_inputs"] = dead
    for key in dict.fromkeys(key for s in stats for key in s.notes):
        told[key] = max(s.notes[key] for s in stats if key in s.notes)
    return told


def describe(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Return what a report says of the model."""
    parameters = list(model.parameters())
    return {
        "name": name or getattr(model, "name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "itemsize": parameters[0].itemsize,
        "bytes": sum(p.numel() * p.itemsize for p in parameters),
    }


def phases(rows: Iterable[Mapping[str, Any]], elapsed: float) -> dict[str, float]:
    """Split the time of the walk: what the method took, and the rest, which is calibration."""
    solving = sum(r["seconds"] for r in rows)
    return {"prune": solving, "calibrate": max(elapsed - solving, 0.0)}


def give_back() -> None:
    """Hand freed memory back to the system: glibc keeps it, in pieces that the next block's tensors do not fit."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def restart_peak() -> None:
    """Let `peak_bytes` count from now, where the system can (Linux); the process's accounting belongs to its program."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> dict[str, int]:
    """Return the peak resident memory of this process so far, and of the accelerator where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["accelerator"] = torch.cuda.max_memory_allocated()
    return peak
