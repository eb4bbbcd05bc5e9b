"""What learning the mask brings: a model pruned once, then trained by each method with its dense teacher; perplexity of each.

    python benchmarks/masks.py --train train.txt --evaluation test.txt --steps 400 --device cuda

All methods start from the same pruned model and see the same windows in the same order, with one evaluation text, which has to
be another. `Full` is training with that mask held: what the others have to beat. float32.
"""

import argparse
import copy
import resource
import time
from typing import Any

import torch

import gossamer
from gossamer.data import calibration, evaluation, texts, windows
from gossamer.evaluate import perplexity
from gossamer.models import causal_lm, resolve, tokenizer
from gossamer.sites._walk import targets
from gossamer.tuning import tuner_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pruner", default="SparseGPT")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", default="Full;AST;CAST;MaskLLM", help="specs, separated by ;")
    parser.add_argument("--train", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=64, help="of the evaluation text")
    parser.add_argument("--samples", type=int, default=32, help="windows to prune by")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rate", help="learning rates, one for each method, separated by ;; by default each method's own")
    parser.add_argument("--last", type=float, default=0.0, help="the last step's rate, as a part of the rate")
    parser.add_argument("--loss", default="1,1,0", help="weights of task, logits and hidden states")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    path = resolve(args.model)
    tokens = tokenizer(path)
    held_out = evaluation(args.evaluation, tokens, first=args.windows)
    samples = calibration(args.train, tokens, samples=args.samples, sample="first")
    text = windows(texts(args.train, split="calibration"), tokens, args.seqlen)
    teacher = causal_lm(path, torch.float32, args.device)
    pruned = copy.deepcopy(teacher)
    gossamer.prune(pruned, args.pruner, args.pattern, data=samples, progress=False)
    dense, before = (perplexity(model, held_out)["perplexity"] for model in (teacher, pruned))
    print(f"{len(text)} windows to train on; perplexity {dense:.3f} dense, {before:.3f} by {args.pruner}\n", flush=True)
    print("| method | rate | steps × tokens | seconds | peak GB | unfinished | finished | of the pruned | gap closed | zeros |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    methods = args.methods.split(";")
    rates = [float(rate) for rate in args.rate.split(";")] if args.rate else [tuner_of(m).rate for m in methods]
    for method, rate in zip(methods, rates, strict=True):
        row = train(method, rate, copy.deepcopy(pruned), teacher, text, held_out, args)
        closed = (before - row["finished"]) / (before - dense)
        print(
            f"| {method} | {rate:g} | {args.steps} × {args.batch * args.seqlen} | {row['seconds']:.0f} | {row['peak']:.2f} | "
            f"{row['unfinished']:.3f} | {row['finished']:.3f} | {row['finished'] / before - 1:+.1%} | {closed:.0%} | "
            f"{row['zeros']:.4%} |",
            flush=True,
        )


def train(method: str, rate: float, student: Any, teacher: Any, text: Any, held_out: Any, args: Any) -> dict[str, float]:
    """Train one copy by one method; seconds are those of the steps alone, the CPU's peak is that of all methods so far."""
    chooses = tuner_of(method).chooses
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    tuning = gossamer.tune(student, method, args.pattern if chooses else None, steps=args.steps, teacher=teacher)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=rate, weight_decay=0.0, fused=True)
    tuning.attach(optimizer)
    warm = max(args.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 1 - (1 - args.last) * min(i / args.steps, 1.0))
    )
    order = torch.Generator().manual_seed(0)
    task, logits, hidden = map(float, args.loss.split(","))
    tuning.model.train()
    started = time.perf_counter()
    with gossamer.distill(tuning.model, teacher, task=task, logits=logits, hidden=hidden) as loss:
        for step in range(args.steps):
            batch = text[torch.randint(len(text), (args.batch,), generator=order)].to(args.device)
            loss(tuning.model(batch), batch).backward()
            torch.nn.utils.clip_grad_norm_(tuning.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(args.steps // 10, 1) == 0:
                parts = ", ".join(f"{name} {part.item():.3f}" for name, part in loss.parts.items())
                print(f"<!-- {method}, step {step}: {parts} -->", flush=True)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unfinished = perplexity(tuning.model.eval(), held_out)["perplexity"]
    model = tuning.finish()
    pruned = [target.parameter for target in targets(model)]
    zeros = sum(int((w == 0).sum()) for w in pruned) / sum(w.numel() for w in pruned)
    finished = perplexity(model, held_out)["perplexity"]
    return {"seconds": seconds, "peak": peak / 1e9, "unfinished": unfinished, "finished": finished, "zeros": zeros}


if __name__ == "__main__":
    main()
