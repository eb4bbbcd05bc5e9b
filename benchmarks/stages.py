"""Pruning and what repairs it without labels, one after the other: rows of `docs/methods.md` beside those of methods.py.

    python benchmarks/stages.py --calibration valid.txt --evaluation test.txt

Block-wise reconstruction after SparseGPT and after Wanda; GQSA with its two stages, `Reconstruct` on the grid and `OQP`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from methods import keep

import gossamer
from gossamer.core.report import environment
from gossamer.data import evaluation
from gossamer.evaluate import perplexity, tasks
from gossamer.models import causal_lm, resolve, tokenizer
from gossamer.sites._rows import peak_bytes, restart_peak

# method, pattern, sparsity, options of the reconstruction
STAGES: list[tuple[str, str, float | None, dict[str, Any]]] = [
    *((method, "2:4", None, {}) for method in ("SparseGPT", "Wanda")),
    *(("SparseGPT", "Unstructured", sparsity, {}) for sparsity in (0.5, 0.7)),
    ("GQSA(bits=None)", "1x16", 0.5, {"bits": 4, "group": 16}),  # and OQP after it
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of the pruning")
    parser.add_argument("--refit", type=int, default=128, help="windows of the reconstruction")
    parser.add_argument("--steps", type=int, default=200, help="of OQP, with 4 windows each; 0 leaves it out")
    parser.add_argument("--only", help="one of the methods that begin")
    parser.add_argument("--tasks")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "docs" / "methods.json")
    args = parser.parse_args()
    source = resolve(args.model)
    tokens = tokenizer(source)
    ids = evaluation(args.evaluation, tokens, first=args.windows)
    teacher = causal_lm(source).to(args.device or "cpu")
    dense = perplexity(teacher, ids)
    document: dict[str, Any] = {"model": {"name": args.model}, "environment": environment(), "dense": dense, "runs": []}
    for method, pattern, sparsity, options in (stage for stage in STAGES if args.only in (None, stage[0])):
        restart_peak()
        model, started = causal_lm(source), time.perf_counter()
        text = {"data": args.calibration, "tokenizer": tokens, "device": args.device, "progress": False}
        pruned = gossamer.prune(model, method, pattern, sparsity=sparsity, samples=args.samples, **text)
        report = gossamer.reconstruct(model, teacher, samples=args.refit, **options, **text).to_json()
        name = f"{method} → Reconstruct"
        if options and args.steps:
            model, name = tuned(model, source, tokens, args), f"{name} → OQP"
        report["seconds"]["total"] = time.perf_counter() - started
        report["recipe"] |= {"method": name, "pruned_by": None, "pattern": pattern, "sparsity": sparsity}
        report["recipe"]["allocate"] = pruned.recipe.get("allocate")
        report["peak_bytes"] = peak_bytes()
        found = report["evaluation"] = perplexity(model, ids, device=args.device)
        if args.tasks:
            answers = tasks(model, args.tasks, args.tasks_dir, tokenizer=tokens, limit=args.limit, device=args.device)
            found["tasks"] = answers
        print(f"{name} {pattern} {sparsity or ''}: {found['perplexity']:.2f}, {report['seconds']['total']:.0f} s", flush=True)
        document["runs"].append(report)
        keep(args.json, "stages", args.samples, document)


def tuned(model: Any, teacher: Path, tokens: Any, args: argparse.Namespace) -> Any:
    """Return the model after OQP."""
    how = {"data": args.calibration, "steps": args.steps, "teacher": teacher, "device": args.device, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        gossamer.save(model, before, tokenizer=tokens)
        gossamer.recover(before, after, "OQP", **how)
        return causal_lm(after).to(args.device or "cpu")


if __name__ == "__main__":
    main()
