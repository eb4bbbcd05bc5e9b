"""Every post-training method on one model: runs what `docs/methods.md` shows, and writes it to docs/methods.json.

    python benchmarks/methods.py --calibration valid.txt --evaluation test.txt

Beside every method by its name alone, the settings that the page compares: methods around others, allocations, permuted 2:4,
groups with 4-bit values. Goes on where it stopped; `--only` and `--methods` run some of it, also side by side with others, each
with an --out of its own.
"""

import argparse
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gossamer.compare import compare
from gossamer.core.atomic import write_text
from gossamer.models import resolve
from gossamer.ranking import rows_of

# name: methods, pattern, sparsities, allocation
PARTS: dict[str, tuple[str, str, list[float], str]] = {
    "2:4": ("all", "2:4", [], "uniform"),
    "50": ("all", "Unstructured", [0.5], "uniform"),
    "70": ("all", "Unstructured", [0.7], "uniform"),
    "permuted": ("Magnitude;Wanda;SparseGPT", "NM(2, 4, permute=True)", [], "uniform"),
    "owl": ("Wanda;SparseGPT", "Unstructured", [0.7], "owl"),
    "ecoflap": ("Wanda;SparseGPT", "Unstructured", [0.7], "ecoflap"),
    "evolved": ("Wanda;SparseGPT", "Unstructured", [0.7], "evolved"),
    "searched": ("SparseGPT", "Unstructured", [0.7], "searched"),
    "global": ("Magnitude", "Unstructured", [0.5, 0.7], "global_(floor=0.2)"),
    "groups": ("Magnitude;Wanda;ALPS;GQSA", "Block(1, 16)", [0.5], "uniform"),
    "around": ("Asymmetric(SparseGPT());Asymmetric(ALPS());DSnoT(SparseGPT())", "Unstructured;2:4", [0.5, 0.7], "uniform"),
}
KEPT = ("method", "pattern", "allocate", "asked", "sparsity", "perplexity", "spread", "seeds", "seconds", "peak_bytes", "tasks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tasks")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--methods", help="which ones, in the place of a part's own")
    parser.add_argument("--out", type=Path, default=Path("compared"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "docs" / "methods.json")
    args = parser.parse_args()
    source = resolve(args.model)
    for name in args.only.split(",") if args.only else PARTS:
        methods, patterns, sparsities, allocate = PARTS[name]
        (args.out / "compare.json").unlink(missing_ok=True)
        try:
            compare(
                source,
                (args.methods or methods).split(";"),
                patterns.split(";"),
                sparsities,
                args.out,
                data=args.calibration,
                evaluation=args.evaluation,
                windows=args.windows,
                samples=args.samples,
                allocate=allocate,
                seeds=args.seeds,
                tasks=args.tasks,
                tasks_dir=args.tasks_dir,
                limit=args.limit,
                speed=args.speed,
                device=args.device,
                name=args.model,
                say=lambda line: print(line, flush=True),
            )
        finally:  # what is there when it is stopped is in the table too
            if (args.out / "compare.json").exists():
                keep(args.json, name, args.samples, json.loads((args.out / "compare.json").read_text(encoding="utf-8")))


def keep(path: Path, name: str, samples: int, document: dict[str, Any]) -> None:
    """Put rows of one part into the file, in the place of those it has, of which the others stay where they were made alike."""
    with changed(path, document["model"]["name"], {"parts": {}}) as found:
        dense, machine = document["dense"], document["environment"]
        on = machine["accelerator"] or f"{machine['threads']} CPU core" + "s" * (machine["threads"] > 1)
        # A GPU's pass is so short that seconds in passes would say nothing.
        one = None if machine["accelerator"] else dense["seconds"] / dense["windows"] * samples
        made = {"samples": samples, "windows": dense["windows"]}
        how = {"pass": one, "machine": on, "dense": dense["perplexity"]}
        rows = [
            {key: row[key] for key in KEPT} | {"speed": (row["speed"] or {}).get("ratio")} | how
            for row in rows_of(document)
            if row["evaluated"]
        ]
        before = found["parts"].get(name, {})
        if all(before.get(key) == value for key, value in made.items()):
            old = {tuple(row[key] for key in KEPT[:4]): row for row in before["rows"]}
            for row in rows:  # more draws without the tasks leave what the first one answered
                row["tasks"] = row["tasks"] or old.get(tuple(row[key] for key in KEPT[:4]), {}).get("tasks", {})
            new = {tuple(row[key] for key in KEPT[:4]) for row in rows}
            rows += [row for key, row in old.items() if key not in new]
        told = dense.get("tasks") or (found.get("dense") or {}).get("tasks")
        found["dense"] = {"perplexity": dense["perplexity"], "tasks": told}
        found["parts"][name] = {**made, "rows": rows}


@contextmanager
def changed(path: Path, model: str, empty: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a file's document to change, and write it back whole; another process that wants it waits so long."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
        if found.setdefault("model", model) != model:
            raise SystemExit(f"{path} has rows of {found['model']}: give another --json for {model}")
        yield found
        write_text(path, json.dumps(found, indent=1) + "\n")
    finally:
        os.close(folder)


if __name__ == "__main__":
    main()
