"""Packed products on the CPU against torch's dense ones, same dtype, same run: a table on standard output.

    python benchmarks/cpu_kernels.py --json cpu.json

Each weight has several copies that take turns, so that no cache keeps it; medians of 30; every product is compared with float64
before it is timed. torch's own CSR is timed beside (in float32, which is what it has, against float32 dense).
"""

import argparse
import json
from pathlib import Path

import torch

from gossamer.core.report import environment
from gossamer.timing import Product, measure, seconds

CPU = torch.device("cpu")


def csr(out: int, in_: int, batch: int, sparsity: float) -> float | None:
    """Time torch's CSR product; None where torch has none."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(out, in_, generator=generator)
    dense[torch.rand(out, in_, generator=generator) < sparsity] = 0
    sparse = [dense.to_sparse_csr() for _ in range(2)]
    x = torch.randn(in_, batch)
    try:
        return seconds(lambda i: sparse[i] @ x, CPU, 2)
    except RuntimeError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="11008x4096,4096x11008")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--csr", action="store_true", help="torch's CSR too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    here = environment()
    print(f"{here['cpu']}, {here['threads']} threads, torch {here['torch']}, {args.dtype}\n")
    print("| shape | batch | sparsity | kernel | dense ms | sparse ms | ratio | byte limit | GB/s dense | GB/s sparse |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for shape in args.shapes.split(","):
        out, in_ = map(int, shape.split("x"))
        for batch in map(int, args.batch.split(",")):
            for sparsity in map(float, args.sparsity.split(",")):
                dense = measure(Product(out, in_, args.dtype, batch), CPU)  # again each time: beside what it is compared with
                found = measure(Product(out, in_, args.dtype, batch, "Bitmask", "Unstructured", sparsity), CPU)
                row = {"shape": shape, "batch": batch, "sparsity": sparsity, "dense": dense, "sparse": found}
                row["ratio"], limit = dense["seconds"] / found["seconds"], dense["bytes"] / found["bytes"]
                rows.append(row)
                times = f"{dense['seconds'] * 1e3:.2f} | {found['seconds'] * 1e3:.2f} | {row['ratio']:.2f}x | {limit:.2f}x"
                speeds = " | ".join(f"{r['bytes'] / r['seconds'] / 1e9:.1f}" for r in (dense, found))
                print(f"| {shape} | {batch} | {sparsity:g} | {found['kernel']} | {times} | {speeds} |", flush=True)
                if args.csr and (taken := csr(out, in_, batch, sparsity)):
                    plain = measure(Product(out, in_, "float32", batch), CPU)["seconds"]
                    times = f"{plain * 1e3:.2f} | {taken * 1e3:.2f} | {plain / taken:.2f}x"
                    print(f"| {shape} | {batch} | {sparsity:g} | torch CSR, float32 | {times} | – | – | – |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": here, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
