"""How long reconstruction takes on a model of a billion parameters, and how much memory it needs.

    python benchmarks/reconstruct_large.py --config llama-1b --samples 16 --seqlen 512

The weights are random, since neither depends on them. The model is pruned to 2:4 by magnitude, then every block is refit to the
dense one's outputs. Memory is the peak of the process, both models included.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

import gossamer
from gossamer.shapes import config_of, random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="llama-1b")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])  # float32 where a CPU has no bfloat16
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher = random_model(config_of(args.config), getattr(torch, args.dtype))
    model = copy.deepcopy(teacher)
    gossamer.prune(model, "Magnitude", "2:4", progress=False)
    windows = torch.randint(1000, (args.samples, args.seqlen), generator=torch.Generator().manual_seed(0))
    report = gossamer.reconstruct(model, teacher, data=windows, epochs=args.epochs, device=args.device, progress=True)
    size = sum(p.nbytes for m in (model, teacher) for p in m.parameters())
    count = sum(p.numel() for p in model.parameters())
    blocks, peak = report.blocks or [], report.peak_bytes["resident"]
    better = sum(block["after"] < block["before"] for block in blocks)
    print(f"{args.config}: {count / 1e9:.2f} B parameters, {args.samples} windows of {args.seqlen}, {args.epochs} epochs")
    print(f"{report.seconds['total'] / 60:.1f} minutes; {better} of {len(blocks)} blocks nearer to the dense ones")
    print(
        f"peak {peak / 1e9:.2f} GB, {(peak - size) / 1e9:.2f} GB beside the two models; zeros {report.totals['sparsity']:.4%}"
    )
    if args.json:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
