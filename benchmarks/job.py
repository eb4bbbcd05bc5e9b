"""One pruning job in a process of its own: cost in plain forward passes, memory over the model's own, perplexity.

    python benchmarks/job.py --method Wanda --pattern Unstructured --sparsity 0.5 --json wanda.json \
        --calibration valid.txt --evaluation test.txt

The plain pass is the whole model over the calibration windows, one at a time, logits included. Memory is the peak resident
size while pruning less the resident size once every weight has been read (loading only maps the file), freed memory handed
back in between (Linux).
"""

import argparse
import ctypes
import json
import resource
import statistics
import time
from pathlib import Path

import torch

import gossamer
from gossamer.data import calibration, evaluation
from gossamer.evaluate import perplexity
from gossamer.models import causal_lm, resolve, tokenizer


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    for window in ids.split(1):
        model(window, use_cache=False)
    return time.perf_counter() - started


def resident() -> int:
    """Return the resident size of this process now."""
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", required=True)
    parser.add_argument("--pattern", required=True)
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--forwards", type=int, default=2, help="plain passes to time")
    parser.add_argument("--dense", action="store_true", help="measure the dense model's perplexity too")
    parser.add_argument("--json", required=True, type=Path)
    args = parser.parse_args()

    path = resolve(args.model)
    tokens = tokenizer(path)
    ids = calibration(args.calibration, tokens, samples=args.samples, sample="first")
    held_out = evaluation(args.evaluation, tokens, first=args.windows)
    model = causal_lm(path, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.sum()
    loaded = resident()
    dense = perplexity(model, held_out)["perplexity"] if args.dense else None
    forward = statistics.median(forward_seconds(model, ids) for _ in range(args.forwards)) if args.forwards else None
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak, so that what came before does not count
    started = time.perf_counter()
    report = gossamer.prune(model, args.method, args.pattern, sparsity=args.sparsity, data=ids, progress=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "tool": "gossamer",
        "version": gossamer.__version__,
        "method": report.recipe["method"],
        "pattern": args.pattern,
        "forward_seconds": forward,
        "seconds": seconds,
        "passes": seconds / forward if forward else None,
        "resident_after_load_bytes": loaded,
        "resident_before_pruning_bytes": before,
        "peak_bytes_over_model": peak - loaded,
        "dense_perplexity": dense,
        "perplexity": perplexity(model, held_out)["perplexity"],
        "sparsity": report.totals["sparsity"],
        "phases": report.seconds,
    }
    print(json.dumps(result, indent=1))
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
