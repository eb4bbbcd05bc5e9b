"""Shrunk models by several methods: parameters left, perplexity without training, and the time of a pass, dense beside it.

    python benchmarks/shrunk.py --calibration valid.txt --evaluation test.txt --methods "Depth@0.2;ZipLM@0.2;ZipLM@1.3x"

METHOD@0.2 removes a fifth of the parameters in the blocks, METHOD@1.3x as much as makes a pass 1.3 times as fast. Rows are kept
in docs/shrunk.json, which `docs/generate.py` makes the table of `docs/shrink.md` of; several may be made side by side.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from methods import changed

import gossamer
from gossamer.core.report import environment
from gossamer.data import evaluation
from gossamer.evaluate import perplexity, tasks
from gossamer.models import causal_lm, resolve, tokenizer
from gossamer.sites._rows import restart_peak
from gossamer.sites.shrinking import structure_of

ROUNDS = 9  # passes of both, in turn
KEY = ("method", "goal", "samples", "seqlen", "windows")  # a row made alike takes the place of the one before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the calibration windows, for methods that read any")
    parser.add_argument("--tasks", help="lm-eval's, of the first draw")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--at", default="1x512", help="the pass that is timed: BATCHxTOKENS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "docs" / "shrunk.json")
    args = parser.parse_args()
    source = resolve(args.model)
    tokens = tokenizer(source)
    ids = evaluation(args.evaluation, tokens, seqlen=512, first=args.windows)
    model = causal_lm(source).to(args.device)
    dense = {"perplexity": perplexity(model, ids)["perplexity"], "tasks": answers(model, tokens, args)}
    del model
    print("| method | parameters left | of the blocks removed | perplexity | pass, dense / shrunk | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for asked in args.methods.split(";"):
        method, goal = asked.rsplit("@", 1)
        reads = bool(structure_of(method).needs)
        draws = [draw(source, method, goal, seed, tokens, ids, args) for seed in range(args.seeds if reads else 1)]
        row = row_of(goal, draws) | {"samples": args.samples, "seqlen": args.seqlen, "windows": len(ids)}
        row |= {"dense": dense["perplexity"], "machine": machine(args.device)}
        keep(args.json, args.model, row, dense["tasks"])
        left = f"{row['parameters'][1]:,} | {row['sparsity']:.4f}"
        quality = "not finite" if row["perplexity"] is None else f"{row['perplexity']:,.2f}"
        print(f"| `{row['method']}` at {goal} | {left} | {quality} | {row['ratio']:.2f}x | {row['seconds']:.0f} |", flush=True)


def draw(source: Path, method: str, goal: str, seed: int, tokens: Any, ids: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return what one draw of the calibration windows comes to; times and tasks of the first one alone."""
    wanted = {"speedup": float(goal[:-1])} if goal.endswith("x") else {"sparsity": float(goal)}
    at = tuple(map(int, args.at.split("x")))
    how = {"data": args.calibration, "tokenizer": tokens, "seqlen": args.seqlen, "samples": args.samples, "seed": seed}
    gc.collect()
    restart_peak()
    model = causal_lm(source).to(args.device)
    started = time.perf_counter()
    report = gossamer.shrink(model, method, **wanted, at=at, **how, device=args.device, progress=False)
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "peak_bytes": max(report.peak_bytes.values())}
    found |= {"method": report.recipe["method"], **{key: report.structure[key] for key in ("parameters", "sparsity")}}
    if not seed:
        dense = causal_lm(source).to(args.device)
        pairs = [(one_pass(dense, at), one_pass(model, at)) for _ in range(1 + ROUNDS)]
        found |= {"at": args.at, "ratio": statistics.median(one / other for one, other in pairs[1:])}
        del dense
        found["tasks"] = answers(model, tokens, args)
    return found | {"perplexity": perplexity(model, ids, device=args.device)["perplexity"]}


def row_of(goal: str, draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of several draws: mean perplexity, highest less lowest, median seconds, the rest of the first draw."""
    found = [one["perplexity"] for one in draws]
    finite = None not in found
    return draws[0] | {
        "goal": goal,
        "perplexity": statistics.fmean(found) if finite else None,
        "spread": max(found) - min(found) if finite and len(found) > 1 else None,
        "seeds": len(draws),
        "seconds": statistics.median(one["seconds"] for one in draws),
        "peak_bytes": max(one["peak_bytes"] for one in draws),
    }


def keep(path: Path, model: str, row: dict[str, Any], told: dict[str, float]) -> None:
    """Put a row into the file, in the place of the one that was made alike; it keeps the tasks that one had, if it has none."""
    with changed(path, model, {"rows": []}) as found:
        same = [one for one in found["rows"] if all(one[key] == row[key] for key in KEY)]
        row["tasks"] = row["tasks"] or (same[0]["tasks"] if same else {})
        found["dense"] = {"tasks": told or found.get("dense", {}).get("tasks", {})}
        found["rows"] = [one for one in found["rows"] if one not in same] + [row]


def answers(model: torch.nn.Module, tokens: Any, args: argparse.Namespace) -> dict[str, float]:
    """Return the accuracy at each task, if any was asked for."""
    if not args.tasks:
        return {}
    found = tasks(model, args.tasks, args.tasks_dir, tokenizer=tokens, limit=args.limit, device=args.device)
    return {task: one["acc"] for task, one in found.items() if "acc" in one}


def machine(device: str) -> str:
    here = environment()
    cores = f"{here['threads']} CPU core" + "s" * (here["threads"] > 1)
    return here["accelerator"] if device != "cpu" and here["accelerator"] else cores


@torch.no_grad()
def one_pass(model: torch.nn.Module, at: tuple[int, ...]) -> float:
    device = next(model.parameters()).device
    tokens = torch.zeros(at, dtype=torch.long, device=device)
    started = time.perf_counter()
    model(input_ids=tokens, use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
