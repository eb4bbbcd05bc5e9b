"""What pruning a random-weight model in bf16 costs on a GPU, in plain forward passes and memory: a table on standard output.

    python benchmarks/gpu_calibration.py --config llama-1b --samples 32 --seqlen 2048

Values are random: time and memory do not depend on them.
"""

import argparse
import time

import torch

import gossamer
from gossamer.shapes import config_of, random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="llama-1b")
    parser.add_argument("--methods", default="Wanda;SparseGPT")
    parser.add_argument("--patterns", default="2:4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=2048)
    args = parser.parse_args()
    config = config_of(args.config)
    ids = torch.randint(config.vocab_size, (args.samples, args.seqlen), generator=torch.Generator().manual_seed(0)).cuda()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{where}; {args.config} in bf16, {args.samples} × {args.seqlen} tokens\n")
    print("| method | pattern | one forward | seconds | passes | peak over the model |\n|---|---|---|---|---|---|", flush=True)
    for method in args.methods.split(";"):
        for pattern in args.patterns.split(";"):
            model = random_model(config, torch.bfloat16, "cuda")
            forward = forward_seconds(model, ids)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            gossamer.prune(model, method, pattern, data=ids, progress=False)
            torch.cuda.synchronize()
            spent, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
            cells = f"{forward:.2f} s | {spent:.1f} | {spent / forward:.1f} | {peak / 1e9:.1f} GB"
            print(f"| {method} | {pattern} | {cells} |", flush=True)
            del model


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The time of a second plain pass, one window after the other; the first one warms up."""
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for window in ids.split(1):
            model(window, use_cache=False)
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
