"""The quality table of docs/benchmarks.md: perplexity by method and pattern on one model, in one process.

    python benchmarks/quality.py --calibration valid.txt --evaluation test.txt --device cuda

On a GPU products are in float32 without TF32, so that figures are those of the CPU up to the order of sums.
"""

import argparse
import json
from pathlib import Path

import torch

import gossamer
from gossamer.data import calibration, evaluation
from gossamer.evaluate import perplexity
from gossamer.models import causal_lm, resolve, tokenizer

SETTINGS = {"50 %": ("Unstructured", 0.5), "2:4": ("2:4", None), "4:8": ("4:8", None), "70 %": ("Unstructured", 0.7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", default="Magnitude;RIA;Wanda;SparseGPT")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")

    path = resolve(args.model)
    tokens = tokenizer(path)
    ids = calibration(args.calibration, tokens, samples=args.samples, sample="first")
    held_out = evaluation(args.evaluation, tokens, first=args.windows)
    dense = perplexity(causal_lm(path, torch.float32, args.device), held_out)["perplexity"]
    print(f"dense {dense:.2f}; {torch.cuda.get_device_name() if args.device != 'cpu' else 'CPU'}, torch {torch.__version__}\n")
    print("| method | pattern | perplexity | × dense |\n|---|---|---|---|", flush=True)
    rows = []
    for name, (pattern, sparsity) in SETTINGS.items():
        for method in args.methods.split(";"):
            model = causal_lm(path, torch.float32, args.device)
            report = gossamer.prune(model, method, pattern, sparsity=sparsity, data=ids, progress=False)
            found = perplexity(model, held_out)["perplexity"]
            rows.append({"method": report.recipe["method"], "pattern": name, "perplexity": found})
            print(f"| {rows[-1]['method']} | {name} | {found:,.2f} | {found / dense:.2f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"dense": dense, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
