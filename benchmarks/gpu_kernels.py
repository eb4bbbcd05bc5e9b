"""The products of packed weights on a GPU, against torch's dense product in the same run.

    python benchmarks/gpu_kernels.py --json gpu.json

Every product is first compared with float64, entry by entry, and not timed if it is wrong. Times are medians of replays of a
CUDA graph in which so many copies of the weight take turns that none is found in a cache. "At most" is what the ratio would be
if time went with the bytes of the weight: dense over packed; TB/s counts the bytes of the packed weight. CSR and 2:4 in
cuSPARSELt are torch's own, CSR outside of a graph, which it cannot be captured in.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM
from gossamer.core.report import environment
from gossamer.timing import Product, measure, seconds

GPU = torch.device("cuda")
LARGE = ((14336, 4096), (4096, 14336))
SMALL = ((8192, 2048), (2048, 2048), (512, 2048))
BYTES = 1 << 29  # of all copies of a weight together


def products() -> Iterator[Product]:
    """Yield every product of ours that is timed."""
    for out, wide in LARGE + SMALL:
        large = (out, wide) in LARGE
        for sparsity in (0.5, 0.7, 0.9) if large else (0.5, 0.9):
            for batch in (1, 2, 4, 16) if large else (1, 16):
                yield Product(out, wide, "bfloat16", batch, "Sliced", "Unstructured", sparsity)
            for batch in (1, 16, 64) if large else (1, 16):
                yield Product(out, wide, "bfloat16", batch, "Bitmask", "Unstructured", sparsity)
            for batch in (1, 4, 8, 16, 32, 64) if large else (1, 16):
                yield Product(out, wide, "bfloat16", batch, "Tiled", "Unstructured", sparsity)
        for batch in (1, 16, 64) if large else (1, 16):
            yield Product(out, wide, "bfloat16", batch, "NM", "2:4", 0.5)
        for pattern in ("4x1", "16x16", "32x32") if large else ():
            for batch in (1, 16):
                yield Product(out, wide, "bfloat16", batch, "Block", pattern, 0.5)


def prompts() -> Iterator[Product]:
    """Yield the products with more inputs, in which a weight may be made dense first."""
    for out, wide in LARGE:
        for sparsity in (0.5, 0.7, 0.9):
            for batch in (64, 128, 256, 512, 1024, 2048, 4096) if (out, wide) == LARGE[0] else (128, 512):
                yield Product(out, wide, "bfloat16", batch, "Tiled", "Unstructured", sparsity)
    for batch in (512, 2048, 4096):
        for layout, pattern, sparsity in (
            ("Sliced", "Unstructured", 0.5),
            ("Sliced", "Unstructured", 0.7),
            ("Bitmask", "Unstructured", 0.5),
            ("NM", "2:4", 0.5),
            ("Block", "16x16", 0.5),
        ):
            yield Product(*LARGE[0], "bfloat16", batch, layout, pattern, sparsity)


def row(product: Product, dense: float, taken: float, size: int) -> dict[str, Any]:
    whole = product.out * product.in_ * 2
    return {
        "out": product.out,
        "in": product.in_,
        "pattern": product.pattern,
        "sparsity": product.sparsity,
        "batch": product.batch,
        "format": product.format,
        "dense_us": dense * 1e6,
        "sparse_us": taken * 1e6,
        "ratio": dense / taken,
        "at_most": whole / size,
        "tb_per_s": size / taken / 1e12,
    }


def eager(run: Callable[[int], Any], turns: int) -> float:
    """Return the median time of a call in seconds, outside of a graph."""
    times = []
    for turn in range(30):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the queue is filled meanwhile, so that launching is not what is timed
        start.record()
        run(turn % turns)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[5:])


def right(y: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.double().T
    if not float((y.double() - exact).norm() / exact.norm()) < 5e-3:
        raise GossamerError("wrong: not timed")


def of_torch(dense: Callable[[int, int, int], float]) -> Iterator[dict[str, Any]]:
    """Time what torch itself has."""
    for out, wide in LARGE:
        for sparsity in (0.5, 0.7, 0.9):
            weight = torch.randn(out, wide, device=GPU).bfloat16() * (torch.rand(out, wide, device=GPU) >= sparsity)
            csr = weight.to_sparse_csr()
            csr = torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape)
            x = torch.randn(1, wide, device=GPU).bfloat16()
            right((csr @ x.T).T, x, weight)
            size = csr.values().nbytes + csr.col_indices().nbytes + csr.crow_indices().nbytes
            copies = [csr.clone() for _ in range(-(-BYTES // size))]
            taken = eager(lambda i, copies=copies, x=x: copies[i] @ x.T, len(copies))  # type: ignore[misc]
            yield row(
                Product(out, wide, "bfloat16", 1, "torch CSR", "Unstructured", sparsity), dense(out, wide, 1), taken, size
            )
        weight = torch.randn(out, wide, device=GPU).bfloat16()
        weight = weight.masked_fill(~NM(2, 4).select(weight.abs()), 0)
        size = out * wide * 9 // 8
        copies = [torch.sparse.to_sparse_semi_structured(weight) for _ in range(-(-BYTES // size))]
        for batch in (1, 16, 64):
            x = torch.randn(batch, wide, device=GPU).bfloat16()
            right(torch.nn.functional.linear(x, copies[0]), x, weight)
            taken = seconds(lambda i, c=copies, x=x: torch.nn.functional.linear(x, c[i]), GPU, len(copies))  # type: ignore[misc]
            yield row(Product(out, wide, "bfloat16", batch, "torch 2:4", "2:4", 0.5), dense(out, wide, batch), taken, size)


def bandwidth() -> float:
    """Return what a copy moves, read and written, in TB/s."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda _: b.copy_(a), GPU, 4) / 1e12


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--ours", action="store_true", help="leave torch's own sparse products out")
    parser.add_argument("--prompts", action="store_true", help="only the products with many inputs")
    args = parser.parse_args()
    torch.manual_seed(0)
    known: dict[tuple[int, int, int], float] = {}

    def dense(out: int, wide: int, batch: int) -> float:
        if (out, wide, batch) not in known:
            known[out, wide, batch] = measure(Product(out, wide, "bfloat16", batch), GPU)["seconds"]
        return known[out, wide, batch]

    copied = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {copied:.2f} TB/s\n")
    print("| shape | pattern | zeros | batch | format | dense µs | sparse µs | ratio | at most | TB/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []

    def note(found: dict[str, Any]) -> None:
        rows.append(found)
        start = "| {out}×{in} | {pattern} | {sparsity:.0%} | {batch} | {format} | {dense_us:.1f} | {sparse_us:.1f} |"
        print((start + " {ratio:.2f} | {at_most:.2f} | {tb_per_s:.2f} |").format(**found), flush=True)

    for product in prompts() if args.prompts else (*products(), *prompts()):
        try:
            found = measure(product, GPU)
        except GossamerError as error:
            print(
                f"| {product.out}×{product.in_} | {product.pattern} | | {product.batch} | {product.format} | | {error} | | | |"
            )
            raise SystemExit(1) from None
        note(row(product, dense(product.out, product.in_, product.batch), found["seconds"], found["bytes"]))
    try:
        for found in () if args.ours or args.prompts else of_torch(dense):
            note(found)
    except (RuntimeError, NotImplementedError) as error:  # torch's own need libraries that are not everywhere
        print(f"\ntorch's own sparse products end here: {str(error).splitlines()[0]}")
    told = {"environment": environment(), "copy_tb_per_s": copied, "rows": rows}
    args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
