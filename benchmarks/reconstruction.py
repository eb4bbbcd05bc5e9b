"""What reconstruction brings: a pruned model's blocks are refit to what its dense teacher's put out; perplexity by it.

    python benchmarks/reconstruction.py --calibration train.txt --evaluation test.txt --device cuda --out reconstruction.json

Both pruning and reconstruction see the calibration text alone; the evaluation text has to be another. float32 unless --dtype.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer.core.report import environment
from gossamer.core.spec import parse
from gossamer.data import calibration, evaluation
from gossamer.evaluate import perplexity
from gossamer.models import causal_lm, resolve, tokenizer
from gossamer.sites._rows import restart_peak

HEAD = (
    "| pattern | reconstruction | windows × tokens | seconds | peak MiB | dense | pruned | reconstructed | gap closed | zeros |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="SparseGPT")
    parser.add_argument("--settings", default="2:4,0.5", help="patterns, or sparsities of Unstructured")
    parser.add_argument("--how", default="Reconstruct", help="specs of reconstruction, between semicolons")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration text to reconstruct on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="windows of evaluation text, of 512 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="where blocks are worked on, and where perplexity is measured")
    parser.add_argument("--offload", action="store_true", help="models in main memory, one block of each on the device")
    parser.add_argument("--out", type=Path, help="write the reports as JSON")
    args = parser.parse_args()

    path = resolve(args.model)
    tokens = tokenizer(path)
    held_out = evaluation(args.evaluation, tokens, first=args.windows)
    samples = calibration(args.calibration, tokens, samples=32, sample="first")
    text = calibration(args.calibration, tokens, samples=args.samples, seqlen=args.seqlen, seed=args.seed)
    home = "cpu" if args.offload else args.device
    teacher = causal_lm(path, getattr(torch, args.dtype), home)

    def measured(model: Any) -> float:
        found = perplexity(model, held_out, device=args.device)["perplexity"]
        model.to(home)
        return float(found)

    dense = measured(teacher)
    runs = []
    print(f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|", flush=True)
    for setting in args.settings.split(","):
        sparsity = None if ":" in setting else float(setting)
        pruned = copy.deepcopy(teacher)
        pattern = setting if sparsity is None else "Unstructured"
        gossamer.prune(pruned, args.method, pattern, sparsity=sparsity, data=samples, device=args.device)
        before = measured(pruned)
        for how in args.how.split(";"):
            method = parse(how, {"Reconstruct": gossamer.Reconstruct}, "reconstruction")
            student = copy.deepcopy(pruned)
            restart_peak()
            started = time.perf_counter()
            batches = [{"input_ids": ids.to(home)} for ids in text.split(method.batch)]
            report = method(student, teacher, batches, seed=args.seed, device=args.device)
            spent = time.perf_counter() - started
            peak = report.peak_bytes["accelerator" if "cuda" in args.device else "resident"]
            after = measured(student)
            closed = (before - after) / (before - dense)
            size = f"{args.samples} × {args.seqlen}"
            told = f"{dense:.2f} | {before:.2f} | {after:.2f} | {closed:.1%} | {report.totals['sparsity']:.4%}"
            print(f"| {setting} | {method} | {size} | {spent:.0f} | {peak / 2**20:.0f} | {told} |", flush=True)
            result = {
                "dense": dense,
                "pruned": before,
                "reconstructed": after,
                "closed": closed,
                "seconds": spent,
                "peak": peak,
            }
            runs.append({"setting": setting, "how": repr(method), **result, "blocks": report.blocks})
    if args.out:
        args.out.write_text(
            json.dumps({"environment": environment(), "arguments": vars(args), "runs": runs}, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
