"""Shrunk models by several methods: parameters left, perplexity without training, and the time of a pass, dense beside it.

    python benchmarks/shrunk.py --calibration valid.txt --evaluation test.txt --methods "Depth@0.2;ZipLM@0.2;ZipLM@1.3x"

METHOD@0.2 removes a fifth of the parameters in the blocks, METHOD@1.3x as much as makes a pass 1.3 times as fast.
"""

import argparse
import gc
import statistics
import time

import torch

import gossamer
from gossamer.data import evaluation
from gossamer.evaluate import perplexity
from gossamer.models import causal_lm, resolve, tokenizer

ROUNDS = 9  # passes of both, in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--at", default="1x512", help="the pass that is timed: BATCHxTOKENS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", required=True)
    args = parser.parse_args()
    source = resolve(args.model)
    tokens = tokenizer(source)
    ids = evaluation(args.evaluation, tokens, seqlen=512, first=args.windows)
    batch, length = map(int, args.at.split("x"))
    dense = causal_lm(source).to(args.device)
    print("| method | parameters left | of the blocks removed | perplexity | pass, dense / shrunk | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for asked in args.methods.split(";"):
        method, goal = asked.rsplit("@", 1)
        wanted = {"speedup": float(goal[:-1])} if goal.endswith("x") else {"sparsity": float(goal)}
        model = causal_lm(source).to(args.device)
        started = time.perf_counter()
        report = gossamer.shrink(
            model,
            method,
            **wanted,
            at=(batch, length),
            data=args.calibration,
            tokenizer=tokens,
            seqlen=args.seqlen,
            samples=args.samples,
            device=args.device,
            progress=False,
        )
        spent = time.perf_counter() - started
        found = report.structure or {}
        pairs = [(one_pass(dense, (batch, length)), one_pass(model, (batch, length))) for _ in range(1 + ROUNDS)]
        ratio = statistics.median(one / other for one, other in pairs[1:])
        quality = perplexity(model, ids, device=args.device)["perplexity"]
        left = f"{found['parameters'][1]:,} | {found['sparsity']:.4f}"
        print(f"| `{method}` at {goal} | {left} | {quality:,.2f} | {ratio:.2f}x | {spent:.0f} |", flush=True)
        del model
        gc.collect()


@torch.no_grad()
def one_pass(model: torch.nn.Module, at: tuple[int, int]) -> float:
    device = next(model.parameters()).device
    tokens = torch.zeros(at, dtype=torch.long, device=device)
    started = time.perf_counter()
    model(input_ids=tokens, use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
