"""Peak memory of a packed model, loaded and decoding, against its packed bytes, measured in a process of its own.

    python benchmarks/packed_memory.py --config llama-1b --sparsity 0.5,0.9
    python benchmarks/packed_memory.py --config llama-8b --sparsity 0.5,0.7,0.9 --device cuda

On the CPU it is the resident set (Linux), on a GPU what torch has allocated there. The peak counts from after a tiny packed
model of the same family was loaded and decoded, so that what any model brings in, transformers' code of the family before all,
is not counted: it is shown beside. Cache and logits are computed.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import gossamer
from gossamer.decode import greedy
from gossamer.shapes import config_of, random_model
from gossamer.speed import mask_at_random

TOKENS = 16  # of the prompt, and as many decoded


def memory(line: str, device: str) -> int:
    """Return a line of this process's status in bytes: VmRSS now, or VmHWM, its peak since it was last reset; or the GPU's."""
    if device != "cpu":
        return torch.cuda.memory_allocated() if line == "VmRSS" else torch.cuda.max_memory_allocated()
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) * 1024


def restart(device: str) -> int:
    """Hand freed memory back, let the peak count from now, and return what is there."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return memory("VmRSS", device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS", device)


def tiny(config: Any) -> Any:
    """Return a configuration of the same family, with next to no weights."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    return type(config)(**{**config.to_dict(), **small, "num_key_value_heads": 1, "vocab_size": 512})


def inside(folder: str, device: str) -> None:
    """Load, decode `TOKENS` tokens, and print what that took."""
    import transformers  # noqa: F401

    import gossamer.hf
    from gossamer.kernels.bitmask import cpu  # noqa: F401

    prompt = torch.arange(TOKENS, device=device)[None]
    bare = restart(device)
    list(greedy(gossamer.load(Path(folder, "tiny"), device=device), prompt, TOKENS))
    before = restart(device)
    model = gossamer.load(Path(folder, "packed"), device=device)
    loaded = memory("VmHWM", device) - before
    restart(device)
    list(greedy(model, prompt, TOKENS))
    peak = memory("VmHWM", device) - before
    config = model.config
    cache = 2 * config.num_hidden_layers * 2 * TOKENS * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    beside = cache + config.vocab_size * model.dtype.itemsize
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    found = {"weights": weights, "loading": loaded, "decoding": peak, "beside": beside, "libraries": before - bare}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="llama-1b")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside, args.device)
        return
    print(
        "| model | sparsity | dense | packed | cache and logits | libraries | peak while loading | and decoding | over packed |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for sparsity in map(float, args.sparsity.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(config_of(args.config), torch.bfloat16, args.device)
            dense = sum(p.nbytes for p in model.parameters())
            mask_at_random(model, sparsity)
            gossamer.save(model, Path(folder, "packed"), packed=True)
            model = random_model(tiny(config_of(args.config)), torch.bfloat16, args.device)
            mask_at_random(model, sparsity)
            gossamer.save(model, Path(folder, "tiny"), packed=True)
            del model
            command = [sys.executable, __file__, "--inside", folder, "--device", args.device]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        sizes = dense, *(found[name] for name in ("weights", "beside", "libraries", "loading", "decoding"))
        cells = [f"{n / 1e9:.3f} GB" for n in sizes]
        over = f"{(found['decoding'] - found['beside']) / found['weights'] - 1:+.1%}"
        print(f"| {args.config} | {sparsity:g} | {' | '.join(cells)} | {over} |", flush=True)


if __name__ == "__main__":
    main()
