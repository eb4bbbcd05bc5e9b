"""Peak memory of a packed model, loaded and decoding, against its packed bytes, measured in a process of its own.

    python benchmarks/packed_memory.py --config llama-1b --sparsity 0.5,0.9

The peak counts from after the imports (Linux), and includes what is alive beside the weights: cache, one step's activations.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gossamer
from gossamer.decode import greedy
from gossamer.shapes import config_of, random_model
from gossamer.speed import mask_at_random


def memory(line: str) -> int:
    """Return a line of this process's status in bytes: VmRSS now, or VmHWM, its peak since it was last reset."""
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) * 1024


def restart() -> int:
    """Hand freed memory back, let the peak count from now, and return what is resident."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def inside(folder: str) -> None:
    """Load, decode 16 tokens, and print what that took."""
    import transformers  # noqa: F401

    import gossamer.hf
    from gossamer.kernels.bitmask import cpu  # noqa: F401

    before = restart()
    model = gossamer.load(folder)
    loaded = memory("VmHWM") - before
    restart()
    list(greedy(model, torch.arange(16)[None], 16))
    peak = memory("VmHWM") - before
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    print(json.dumps({"weights": weights, "loading": loaded, "decoding": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="llama-1b")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside)
        return
    print("| model | sparsity | dense bytes | packed bytes | peak while loading | peak while decoding | over its bytes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for sparsity in map(float, args.sparsity.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(config_of(args.config), torch.bfloat16)
            dense = sum(p.nbytes for p in model.parameters())
            mask_at_random(model, sparsity)
            gossamer.save(model, Path(folder, "packed"), packed=True)
            del model
            command = [sys.executable, __file__, "--inside", str(Path(folder, "packed"))]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        cells = [f"{n / 1e9:.3f} GB" for n in (dense, found["weights"], found["loading"], found["decoding"])]
        over = f"{found['decoding'] / found['weights'] - 1:+.1%}"
        print(f"| {args.config} | {sparsity:g} | {' | '.join(cells)} | {over} |", flush=True)


if __name__ == "__main__":
    main()
