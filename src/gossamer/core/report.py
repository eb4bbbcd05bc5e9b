"""Report: what was done, and what it cost and bought. The JSON is the truth; pages and tables are drawn from it."""

import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from gossamer.core.atomic import write_text
from gossamer.core.errors import GossamerError

FORMAT = 1


@dataclass
class Report:
    """One run as plain JSON values.

    Attributes:
        kind: the verb that ran ("prune").
        recipe: everything that decides the result, as spec strings and numbers.
        model: name, class, parameters, dtype and bytes of the model.
        weights: a row for each pruned weight: name, shape, sparsity, nnz, and what the method has to say of it.
        seconds: wall time by phase, "total" among them.
        peak_bytes: the process's peak resident memory (and the accelerator's, where one was used).
        environment: versions and machine.
        evaluation: perplexity, tokens, seqlen, where the result was evaluated.
        speed: where decoding was measured, dense and packed in one run: batch, context, dense and packed (seconds a step),
            ratio, dense_bytes and bytes (of the whole model in memory), said (what was packed, in one sentence).
        training: where it was trained: losses (a number a step, None where not finite), trainable (parameters), rounded (kept
            weights that became zero), before and dense (perplexities on the text of ``evaluation``).
        blocks: where blocks were worked on one by one, what is to be said of each.
        structure: where structure was removed: parameters, inside (those in the blocks) and blocks, each [before, after];
            sparsity (the fraction of those inside that is gone), plain (whether plain transformers opens it), widths (if not).
    """

    kind: str
    recipe: dict[str, Any]
    model: dict[str, Any]
    weights: list[dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    evaluation: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    blocks: list[dict[str, Any]] | None = None
    structure: dict[str, Any] | None = None

    @property
    def totals(self) -> dict[str, Any]:
        """Count over all pruned weights: entries, those not zero, the sparsity, and bytes dense and as a bitmask.

        ``bytes_bitmask`` counts what the non-zero values plus one bit for each entry would take; of a weight that has become a
        product (``format`` Wrapped), whose zeros are its core's, what the product takes. Where structure was removed and there
        are no such weights, the sparsity is the fraction that is gone.
        """
        size = sum(math.prod(w["shape"]) for w in self.weights)
        nnz = sum(w["nnz"] for w in self.weights)
        itemsize = self.model.get("itemsize", 4)
        products = [w for w in self.weights if w.get("format") == "Wrapped"]
        nnz_masked = nnz - sum(w["nnz"] for w in products)
        size_masked = size - sum(math.prod(w["shape"]) for w in products)
        return {
            "weights": len(self.weights),
            "entries": size,
            "nnz": nnz,
            "sparsity": 1 - nnz / size if size else (self.structure or {}).get("sparsity", 0.0),
            "bytes_dense": size * itemsize,
            "bytes_bitmask": sum(w["bytes"] for w in products) + nnz_masked * itemsize + math.ceil(size_masked / 8),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {"format": FORMAT, **asdict(self), "totals": self.totals}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read a report back: ``Report.from_json(r.to_json()) == r``."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or "recipe" not in value:
            raise GossamerError("this is not a gossamer report of format 1 (it wants an object with format, kind and recipe)")
        try:
            return cls(**{k: v for k, v in value.items() if k not in ("format", "totals")})
        except TypeError as error:
            raise GossamerError(f"this is not a gossamer report of format {FORMAT}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from a JSON file."""
        return cls.from_json(read_json(Path(path)))

    def __str__(self) -> str:
        if self.structure is not None:
            return self._shrunk(self.structure)
        total = self.totals
        what = " ".join(filter(None, (self.recipe.get("method"), self.recipe.get("pattern")))) or self.kind
        return (
            f"{what}: {total['weights']} weights, {total['nnz']:,} of {total['entries']:,} entries kept, "
            f"sparsity {total['sparsity']:.4f}, {self.seconds.get('total', 0):.1f} s"
        )

    def _shrunk(self, found: dict[str, Any]) -> str:
        was, now = found["parameters"]
        blocks = "{} → {} blocks".format(*found["blocks"])
        time = found.get("latency")
        faster = "" if time is None else "{:.2f}x as fast ({:.2f} asked for), ".format(*reversed(time["speedup"]))
        return (
            f"{self.recipe['method']}: {was:,} → {now:,} parameters, {blocks}, {found['sparsity']:.4f} of the parameters "
            f"inside the blocks removed, {faster}{self.seconds.get('total', 0):.1f} s"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise the one clear line that says what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GossamerError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise GossamerError(f"{path} is not JSON: {error}") from None


def environment() -> dict[str, Any]:
    """Return the versions and the machine a figure was made with."""
    from gossamer import __version__

    transformers = sys.modules.get("transformers")
    return {
        "gossamer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": getattr(transformers, "__version__", None),
        "platform": platform.system() + " " + platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
