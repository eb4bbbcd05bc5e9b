"""What recovery brings: every way of training a pruned model, side by side, in one table.

    python benchmarks/recovery.py --training valid.txt --evaluation test.txt --steps 200
    python benchmarks/recovery.py --training valid.txt --evaluation test.txt --pattern 2:4 --methods "Full;AST" --device cuda

The dense model is pruned by ``--method`` on windows of the training text; then `gossamer.recover` trains it by each method from
its directory, with the dense model as the teacher. The evaluation text has to be another. LoRA is peft's own, merged the
ordinary way. Dense trains the dense model itself, to show what of a gain is getting used to the text. Memory is the peak of the
process (the GPU's, where there is one), teacher included; zeros are counted in the result, and compared entry by entry with
those from before.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.core.spec import parse, spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.models import causal_lm, resolve, tokenizer
from gossamer.recovering import WAYS
from gossamer.sites.reconstructing import Reconstruct

METHODS = (
    "Dense;LoRA(rank=16);PERP;ScaleLoRA;SPP;LoRAPrune(rank=16);MaskLoRA(rank=16);MaskLoRA(rank=64);Full;PST;"
    "Reconstruct(epochs=1);"
    "AST;CAST;MaskLLM"
)


@spec
class LoRA(Tuner):
    """PEFT's own LoRA on every linear of the blocks, merged the ordinary way, which fills the zeros."""

    rank: int = 16

    rate = 1e-3  # MaskLoRA's
    chooses = True  # so that nobody looks for the zeros that it loses

    def start(self, model: nn.Module, how: How) -> Tuning:
        return _LoRA(model, self.rank)


class _LoRA(Tuning):
    def __init__(self, model: nn.Module, rank: int) -> None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, settings)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def attach(self, optimizer: Optimizer) -> Self:
        return self

    def finish(self) -> nn.Module:
        return self.model.merge_and_unload()

    def state_dict(self) -> dict[str, Tensor]:
        raise GossamerError("this run cannot be resumed")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise GossamerError("this run cannot be resumed")


@spec
class Dense(Tuner):
    """The control: the dense model, all of it trained the same way."""

    chooses = True

    def start(self, model: nn.Module, how: How) -> Tuning:
        return _Dense(model)


class _Dense(_LoRA):
    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_()

    def finish(self) -> nn.Module:
        return self.model


OURS = {"LoRA": LoRA, "Dense": Dense}


def read(method: str) -> Tuner | Reconstruct:
    return parse(method, WAYS | OURS, "method")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="SparseGPT", help="what prunes")
    parser.add_argument("--methods", default=METHODS, help="what recovers, separated by ;")
    parser.add_argument("--pattern", default="Unstructured;2:4")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--training", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--loss", default="distill")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path, rows = resolve(args.model), []
    print(
        "| pattern | method | trained | seconds | peak memory | dense | pruned | recovered | gap closed | zeros | every one |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for pattern in args.pattern.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            pruned = Path(folder, "pruned")
            prune(path, pruned, pattern, args)
            for method in args.methods.split(";"):
                rows.append(row(pruned, Path(folder, "out"), pattern, method, path, args))
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")


def prune(path: Path, pruned: Path, pattern: str, args: argparse.Namespace) -> None:
    shape = gossamer.tuning.pattern_of(pattern)
    model = causal_lm(path, torch.float32)  # on the CPU, where SparseGPT's many small steps are not launches
    report = gossamer.prune(
        model,
        args.method,
        pattern,
        sparsity=args.sparsity if shape.takes_sparsity else None,
        data=args.training,
        tokenizer=tokenizer(path),
        samples=64,
        progress=False,
    )
    gossamer.save(model, pruned, report=report, tokenizer=tokenizer(path))


def row(pruned: Path, out: Path, pattern: str, method: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    tuner = read(method)
    if isinstance(tuner, Dense):
        pruned = path
    mask: dict[str, Any] = {}
    if isinstance(tuner, Tuner) and tuner.chooses:
        shape = gossamer.tuning.pattern_of(pattern)
        mask = {"pattern": pattern, "sparsity": args.sparsity if shape.takes_sparsity else None}
    began = time.perf_counter()
    try:
        report = gossamer.recover(
            pruned,
            out,
            tuner,
            **mask,
            teacher=path,
            data=args.training,
            steps=args.steps,
            batch=args.batch,
            seqlen=args.seqlen,
            rate=args.rate,
            loss=args.loss,
            evaluate=args.evaluation,
            evaluated=args.windows,
            device=args.device,
            every=float("inf"),
            force=True,
            progress=False,
        )
    except GossamerError as error:
        print(f"| {pattern} | {method} | – | {error} |", flush=True)
        return {"pattern": pattern, "method": method, "error": str(error)}
    before, after = gossamer.load(pruned), gossamer.load(out)
    same = all(torch.equal(a == 0, b == 0) for a, b in zip(linears(before), linears(after), strict=True))
    trained, found = report.training or {}, (report.evaluation or {})["perplexity"]
    gap = trained["before"] - trained["dense"]
    closed = f"{(trained['before'] - found) / gap:.0%}" if gap else "–"
    peak = report.peak_bytes.get("accelerator", report.peak_bytes["resident"])
    told = f"{trained['dense']:.2f} | {trained['before']:.2f} | {found:.2f} | {closed} | {report.totals['sparsity']:.2%}"
    size = f"{trained['trainable'] / 1e6:.2f} M | {report.seconds['train']:.0f} | {peak / 1e9:.2f} GB"
    print(f"| {pattern} | {method} | {size} | {told} | {'yes' if same else 'no'} |", flush=True)
    return {"pattern": pattern, "same": same, "wall": time.perf_counter() - began, **report.to_json(), "weights": []}


def linears(model: nn.Module) -> list[Tensor]:
    return [target.parameter for target in gossamer.sites._walk.targets(model)]


if __name__ == "__main__":
    main()
