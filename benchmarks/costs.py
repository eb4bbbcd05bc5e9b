"""What each method should cost, summed from its parts timed here, beside what it took.

    python benchmarks/costs.py --calibration valid.txt --pattern 2:4

The parts: P, a forward pass of the calibration windows through the blocks; B, a pass of them through the whole model and back,
for the gradients of all weights; for each distinct input of d features G, its Gram
matrix over all tokens, F, H⁻¹'s factor (two Cholesky factorisations and an inverse), and E, an eigendecomposition, all of
d × d; for each weight of (out, d) M, a product of it with a d × d matrix, S, the choice of a mask, and R, the kept weights of
each row solved for. What a method is made of is in `MODELS`.
"""

import argparse
import collections
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gossamer
from gossamer.core.pattern import Pattern
from gossamer.core.refit import refit
from gossamer.core.spec import parse
from gossamer.core.stats import Stats
from gossamer.data import calibration
from gossamer.models import causal_lm, resolve, tokenizer
from gossamer.sites._job import PATTERNS
from gossamer.sites._walk import blocks_of, targets

# What a method is made of; n is the mean number of its steps, which its report tells.
MODELS = {
    "Magnitude": {"S": 1},
    "Gradient": {"B": 1, "S": 1},
    "Fisher": {"B": 1, "S": 1},
    "Wanda": {"P": 1, "S": 1},
    "RIA": {"P": 1, "S": 1},
    "NoWagP": {"P": 1, "S": 1},
    "SparseGPT": {"P": 1, "G": 1, "F": 1, "M": 1, "S": 1},
    "NetTrim": {"P": 1, "G": 1, "E": 1, "M": 100, "S": 2, "R": 3},
    "ALPS": {"P": 1, "G": 1, "E": 1, "Mn": 2, "Sn": 1, "R": 2},
    "Asymmetric(SparseGPT())": {"P": 2, "G": 2.6, "F": 1, "M": 3, "S": 1},  # a second matrix, of which no half is spared
    "Parallel(SparseGPT())": {"P": 2, "G": 2, "F": 1, "M": 1, "S": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--blocks", type=int, help="only the first so many blocks of the model")
    parser.add_argument("--methods", default=";".join(MODELS))
    args = parser.parse_args()
    source = resolve(args.model)
    ids = calibration(args.calibration, tokenizer(source), seqlen=512, samples=args.samples)
    pattern = parse(args.pattern, PATTERNS, "pattern")
    parts = parts_of(cut(source, args.blocks), pattern, args.sparsity, ids)
    print("| method | one pass | should take | took | ratio |\n|---|---|---|---|---|", flush=True)
    for method in args.methods.split(";"):
        model = cut(source, args.blocks)
        one = passes(model, ids)
        parts["B"] = back(model, ids) if "B" in MODELS[method] else 0.0
        started = time.perf_counter()
        report = gossamer.prune(model, method, args.pattern, sparsity=args.sparsity, data=ids, progress=False)
        took = time.perf_counter() - started
        steps = [row["steps"] for row in report.weights if "steps" in row]
        n = sum(steps) / len(steps) if steps else 0
        made = {part: times * (n if part.endswith("n") else 1) for part, times in MODELS[method].items()}
        wanted = sum(times * (one if part == "P" else parts[part.rstrip("n")]) for part, times in made.items())
        what = " + ".join(f"{times:.4g} {part.rstrip('n')}" for part, times in made.items())
        print(f"| {method} | {one:.1f} s | {what} = {wanted:.1f} s | {took:.1f} s | {took / wanted:.2f} |", flush=True)
        del model
        gc.collect()


def cut(source: Path, blocks: int | None) -> torch.nn.Module:
    model = causal_lm(source)
    if blocks is not None:
        del blocks_of(model)[1][blocks:]
        model.config.get_text_config().num_hidden_layers = blocks
    return model


@torch.no_grad()
def passes(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the seconds of a pass of all windows through the blocks, one at a time."""
    model = model.base_model  # type: ignore[assignment] # without logits, which no method here asks for
    model(input_ids=ids[:1])
    started = time.perf_counter()
    for window in ids.split(1):
        model(input_ids=window)
    return time.perf_counter() - started


def back(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the seconds of the gradients of the next-token loss on each window, with respect to all that is pruned."""
    model.requires_grad_(False)
    weights = [model.get_parameter(target.name).requires_grad_(True) for target in targets(model)]

    def gradients(window: torch.Tensor) -> None:
        torch.autograd.grad(model(input_ids=window, labels=window, use_cache=False).loss, weights)

    gradients(ids[:1])
    started = time.perf_counter()
    for window in ids.split(1):
        gradients(window)
    return time.perf_counter() - started


@torch.no_grad()
def parts_of(model: torch.nn.Module, pattern: Pattern, sparsity: float | None, ids: torch.Tensor) -> dict[str, float]:
    """Return the seconds of each part, summed over the model: timed once for each shape, and counted."""
    found = targets(model)
    shapes = collections.Counter(tuple(target.parameter.shape) for target in found)
    inputs = collections.Counter(target.parameter.shape[1] for target in found if not target.name.endswith(SHARING))
    total = dict.fromkeys("GFEMSR", 0.0)
    for d, count in inputs.items():
        stats = Stats(d, gram=True)
        stats.add(torch.randn(2 * d, d))
        window = torch.randn(ids.shape[1], d)
        total["G"] += count * len(ids) * timed(lambda s=stats, x=window: s.add(x))
        total["F"] += count * timed(lambda s=stats: (s._factors.clear(), s.inverse_factor(0.01)))
        total["E"] += count * timed(lambda s=stats: (s._spectra.clear(), s.spectrum(0.01)))
        for (out, wide), weights in shapes.items():
            if wide == d:
                w, h = torch.randn(out, d), stats.hessian(0.01)
                mask = pattern.select(w.abs(), sparsity)
                total["M"] += weights * timed(lambda w=w, h=h: w @ h)
                total["S"] += weights * timed(lambda w=w: pattern.select(w.abs(), sparsity))
                total["R"] += weights * timed(lambda w=w, h=h, mask=mask: refit(w, mask, h))
    return total


SHARING = ("k_proj.weight", "v_proj.weight", "up_proj.weight")  # their inputs are those of the query and of the gate


def timed(run: Callable[[], object]) -> float:
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
