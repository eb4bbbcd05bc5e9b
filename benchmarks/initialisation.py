"""Pruning before training: a small Llama is pruned once at its random initialisation, trained, and its loss is compared.

    OMP_NUM_THREADS=1 python benchmarks/initialisation.py --data text.txt --seeds 0,1

The scores that were made for this, each ranked over all weights together (global_) and within each weight (uniform), beside the
dense model. Tokens are bytes. All runs of one seed begin with the same weights and see the same windows, by the same AdamW; the
zeros are held, and looked at once more at the end. A file's last tenth is held out; other data has a part of its own.

Goes on where it stopped: --json has a row a run. Processes with other --seeds may share that file; a last call with all of them
prints the table. Spreads are highest less lowest over the seeds; "least kept" is the smallest share that any weight keeps, in
any of them.
"""

import argparse
import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer import Cosine, Gradient, GraSP, Magnitude, Random, Sampled, Score, SynFlow
from gossamer.core.atomic import write_text
from gossamer.data import texts
from gossamer.evaluate import perplexity
from gossamer.sites._walk import targets

SCORES: dict[str, Callable[[int], Score]] = {
    "Random": Random,
    "Magnitude": lambda _: Magnitude(),
    "Sampled(Magnitude)": lambda seed: Sampled(Magnitude(), seed),
    "Gradient": lambda _: Gradient(),
    "Sampled(Gradient)": lambda seed: Sampled(Gradient(), seed),
    "GraSP": lambda _: GraSP(),
    "SynFlow": lambda _: SynFlow(),
}
KEY = ("sparsity", "score", "allocate")  # and the seed: what tells one run from another
DENSE = (0.0, "dense", "–")
MADE = ("hidden", "blocks", "steps", "batch", "seqlen", "rate", "samples", "windows")  # the same for all rows of a file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--scores", default=";".join(SCORES), help="separated by ;")
    parser.add_argument("--allocate", default="global_;uniform", help="separated by ;")
    parser.add_argument("--sparsity", default="0.8,0.95")
    parser.add_argument("--seeds", default="0,1", help="each decides initialisation, windows and draws")
    parser.add_argument("--hidden", type=int, default=64, help="the MLPs are three times as wide")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--samples", type=int, default=32, help="windows of the training part that Gradient and GraSP see")
    parser.add_argument("--windows", type=int, default=256, help="of the held-out part")
    parser.add_argument("--json", type=Path, default=Path("initialisation.json"))
    args = parser.parse_args()
    training, held_out = split(args.data, args.windows, args.seqlen)
    made = {**{name: getattr(args, name) for name in MADE}, "data": Path(args.data).name, "bytes": len(training)}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    pruned = [
        (float(s), name, allocate)
        for s in args.sparsity.split(",")
        for name in args.scores.split(";")
        for allocate in args.allocate.split(";")
    ]
    print(f"{len(training):,} bytes to train on, {held_out.numel():,} held out", flush=True)
    for seed in seeds:
        for key in [DENSE, *pruned]:
            if (row := find(rows_of(args.json, made), key, seed)) is None:
                row = run(key, seed, training, held_out, args)
                add(args.json, made, row)
            print(said(row), flush=True)
    table(rows_of(args.json, made), [DENSE, *pruned], seeds)


def split(data: str, windows: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on, and windows of the held-out ones, spread evenly over them."""
    text, other = (torch.tensor(list(texts(data, split=part).encode())) for part in ("calibration", "evaluation"))
    if torch.equal(text, other):  # a file has one part
        text, other = text.split([len(text) - len(text) // 10, len(text) // 10])
    found = other[: len(other) // seqlen * seqlen].view(-1, seqlen)
    if len(found) < windows:
        raise SystemExit(f"the held-out part has {len(found)} windows of {seqlen} bytes, fewer than the {windows} asked for")
    return text, found[torch.linspace(0, len(found) - 1, windows).long()]


def run(key: tuple[float, str, str], seed: int, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, prune and train it; return its row."""
    sparsity, name, allocate = key
    draws = torch.Generator().manual_seed(seed)

    def windows(count: int) -> Tensor:
        starts = torch.randint(len(training) - args.seqlen + 1, (count, 1), generator=draws)
        return training[starts + torch.arange(args.seqlen)]

    samples = windows(args.samples)  # drawn for every score, so that all see the same windows afterwards
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.blocks,
            num_attention_heads=4,
            max_position_embeddings=args.seqlen,
            tie_word_embeddings=True,
        )
    )
    row = {**dict(zip(KEY, key, strict=True)), "seed": seed, "least": 1.0, "least_of": None, "kept": 1.0, "prune_seconds": 0.0}
    started = time.perf_counter()
    if key != DENSE:
        report = gossamer.prune(
            model, SCORES[name](seed), "Unstructured", sparsity=sparsity, allocate=allocate, data=samples, progress=False
        )
        emptiest = max(report.weights, key=lambda weight: weight["sparsity"])
        row |= {"least": emptiest["nnz"] / math.prod(emptiest["shape"]), "least_of": emptiest["name"]}
        row |= {"kept": 1 - report.totals["sparsity"], "prune_seconds": time.perf_counter() - started}
    zeros = [target.parameter == 0 for target in targets(model)]
    train(model, windows, key != DENSE, args)
    for target, zero in zip(targets(model), zeros, strict=True):  # the hold's own check leaves out what is nothing but zeros
        if filled := int((target.parameter[zero] != 0).sum()):
            raise SystemExit(f"{name}, {allocate}, seed {seed}: {target.name} lost {filled} zeros in training")
    found = perplexity(model, held_out, batch=32)["perplexity"]
    return {**row, "loss": None if found is None else math.log(found), "seconds": time.perf_counter() - started}


def train(model: LlamaForCausalLM, windows: Callable[[int], Tensor], held: bool, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, fused=True)
    warm = max(args.steps // 10, 1)
    falling = Cosine(1.0, 0.0, args.steps - warm, begin=warm)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, falling(i)))
    model.train()
    with gossamer.hold(model, optimizer) if held else nullcontext():
        for step in range(args.steps):
            batch = windows(args.batch)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % 100 == 0:
                print(f"  step {step + 1}: {loss.item():.3f}", flush=True)


def rows_of(path: Path, made: dict[str, Any]) -> list[dict[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"made": made, "rows": []}
    if document["made"] != made:
        raise SystemExit(f"{path} has runs of {document['made']}: give another --json for {made}")
    return document["rows"]


def add(path: Path, made: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a row to what the file has by now: another process may have written to it."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_text(path, json.dumps({"made": made, "rows": [*rows_of(path, made), row]}, indent=1) + "\n")
    finally:
        os.close(folder)


def find(rows: list[dict[str, Any]], key: tuple[float, str, str], seed: int) -> dict[str, Any] | None:
    return next((row for row in rows if tuple(row[part] for part in KEY) == key and row["seed"] == seed), None)


def said(row: dict[str, Any]) -> str:
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    what = f"seed {row['seed']}: {row['score']}, {row['allocate']}, {row['sparsity']:.0%}: loss {loss}"
    least = f", least kept {row['least']:.2%} ({row['least_of']})" if row["least_of"] else ""
    return f"{what}{least}, kept {row['kept']:.2%}, {row['prune_seconds']:.0f} of {row['seconds']:.0f} s to prune"


def table(rows: list[dict[str, Any]], keys: list[tuple[float, str, str]], seeds: list[int]) -> None:
    """Print a row for each key: its losses, and what each is over that of Random, all else being the same."""
    print("\n| sparsity | score | allocation | loss | spread | over Random | spread | least kept |\n" + "|---" * 8 + "|")
    for key in keys:
        found = [row for seed in seeds if (row := find(rows, key, seed))]
        chance = [find(rows, (key[0], "Random", key[2]), row["seed"]) for row in found]
        pairs = [(row["loss"], other and other["loss"]) for row, other in zip(found, chance, strict=True)]
        over = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        told = f"{spread([row['loss'] for row in found])} | {spread(over, '+')} | {min(row['least'] for row in found):.2%}"
        print(f"| {key[0]:.0%} | `{key[1]}` | {key[2]} | {told} |")


def spread(values: list[float | None], sign: str = "") -> str:
    known = [x for x in values if x is not None]
    return f"{statistics.mean(known):{sign}.3f} | {max(known) - min(known):.3f}" if known == values else "– | –"


if __name__ == "__main__":
    main()
