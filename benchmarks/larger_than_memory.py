"""Prune a random-weight Llama of 3B parameters in bf16 by the command line, and measure its peak memory from outside.

    python benchmarks/larger_than_memory.py --folder big --method SparseGPT --pattern 2:4

The checkpoint (6.2 GB, made once, shard by shard) has Llama-3.2-3B's shape and SmolLM2's tokenizer and vocabulary; the result
takes as much again. Values are random: memory and time do not depend on them.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from gossamer.models import resolve

SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def make(folder: Path) -> int:
    """Write the checkpoint one block at a time; return its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = resolve("smollm2")
    config = LlamaConfig(**SHAPE, vocab_size=49152, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    config.dtype = "bfloat16"
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    count = sum(shape.numel() for shape in shapes.values())
    if (folder / "config.json").exists():
        return count
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = shape
    weight_map = {}
    for number, (_, names) in enumerate(shards.items(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for name, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("big"))
    parser.add_argument("--method", default="SparseGPT")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", default="8")
    args = parser.parse_args()
    count = make(args.folder / "dense")
    out = args.folder / "pruned"
    how = [
        "--method",
        args.method,
        "--pattern",
        args.pattern,
        "--data",
        "builtin",
        "--samples",
        args.samples,
        "--seqlen",
        "512",
    ]
    command = [sys.executable, "-m", "gossamer", "prune", str(args.folder / "dense"), *how, "--force", "--out", str(out)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    report = json.loads((out / "report.json").read_text())
    print(
        f"{count / 1e9:.2f}B parameters, {args.method} {args.pattern}: peak resident {peak / 1e9:.2f} GB, {seconds:.0f} s, "
        f"sparsity {report['totals']['sparsity']:.4f} over {report['totals']['weights']} weights"
    )


if __name__ == "__main__":
    main()
