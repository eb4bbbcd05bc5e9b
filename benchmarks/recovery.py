"""What recovery brings: a pruned model, its zeros held, learns from its dense teacher; perplexity before and after.

    python benchmarks/recovery.py --calibration train.txt --evaluation test.txt --pattern 2:4 --steps 100

Training text is the calibration text's windows, in random order; the evaluation text has to be another. float32.
"""

import argparse
import copy
import time

import torch

import gossamer
from gossamer.data import calibration, evaluation
from gossamer.evaluate import perplexity
from gossamer.models import causal_lm, resolve, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="SparseGPT")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--loss", default="1,1,1", help="weights of task, logits and hidden states")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    path = resolve(args.model)
    tokens = tokenizer(path)
    held_out = evaluation(args.evaluation, tokens, first=args.windows)
    samples = calibration(args.calibration, tokens, samples=32, sample="first")
    text = calibration(args.calibration, tokens, samples=args.steps * args.batch, seqlen=args.seqlen)
    teacher = causal_lm(path, torch.float32, args.device)
    student = copy.deepcopy(teacher)
    dense = perplexity(teacher, held_out)["perplexity"]
    gossamer.prune(student, args.method, args.pattern, sparsity=args.sparsity, data=samples, progress=False)
    before = perplexity(student, held_out)["perplexity"]

    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.rate, weight_decay=0.0, fused=True)
    warm = max(args.steps // 10, 1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, 1 - i / args.steps))
    task, logits, hidden = map(float, args.loss.split(","))
    started, took = time.perf_counter(), []
    with (
        gossamer.hold(student, optimizer) as held,
        gossamer.distill(student, teacher, task=task, logits=logits, hidden=hidden) as loss,
    ):
        for step, batch in enumerate(text.to(args.device).split(args.batch)):
            begun = time.perf_counter()
            loss(student(batch), batch).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            took.append(time.perf_counter() - begun)
            if step % 10 == 0:
                print(step, {k: round(v.item(), 3) for k, v in loss.parts.items()}, f"{took[-1]:.1f} s", flush=True)
    spent = time.perf_counter() - started
    report = held.check()
    after = perplexity(student.eval(), held_out)["perplexity"]
    closed = (before - after) / (before - dense)
    print("| pattern | loss | steps × tokens | seconds | dense | pruned | recovered | gap closed | zeros |")
    print("|---|---|---|---|---|---|---|---|---|")
    size, zeros = f"{args.steps} × {args.batch * args.seqlen}", report.totals["sparsity"]
    told = f"{dense:.2f} | {before:.2f} | {after:.2f} | {closed:.0%} | {zeros:.4%}"
    print(f"| {args.pattern} | {args.loss} | {size} | {spent:.0f} | {told} |")


if __name__ == "__main__":
    main()
