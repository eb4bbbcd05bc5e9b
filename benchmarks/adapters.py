"""A training step of the sparse adapters against peft's LoRA: python benchmarks/adapters.py [--model smollm2] [--device cuda]

A step is forward, backward and AdamW on the adapter. Steps of the methods alternate in one process; the figures are medians;
a ratio is the median of the ratios within a round. Memory is the peak of three steps in a process that does nothing else, the
model included. FLOPs are counted, not estimated: a masked update needs the gradient of the whole weight, which is a third
product of that size where LoRA has two.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import peft
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer import hf
from gossamer.models import causal_lm, resolve
from gossamer.sites._rows import peak_bytes, restart_peak

SHAPES = {
    "like-smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "like-llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="like-smollm2", help=f"a directory, a hub id, smollm2, or {', '.join(SHAPES)}")
    parser.add_argument("--methods", default="MaskLoRA", help="of MaskLoRA, ScaleLoRA, LoRAPrune, SPP, PST")
    parser.add_argument("--pattern", default="Unstructured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # what a process that measures memory runs
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, arguments)))
        return
    methods = ["LoRA", *arguments.methods.split(",")]
    steps = {method: Step(method, arguments) for method in methods}
    flops = {method: step.flops() for method, step in steps.items()}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for step in steps.values():
        step()
    for repeat in range(arguments.repeats):
        for method in methods if repeat % 2 else reversed(methods):
            seconds[method].append(steps[method]())
    parameters = {method: step.parameters for method, step in steps.items()}
    steps.clear()
    gc.collect()
    memory = {method: in_a_process(method) for method in methods}
    tokens = f"{arguments.batch}×{arguments.seqlen} tokens"
    print(f"{arguments.model}, {arguments.dtype}, rank {arguments.rank}, {tokens}, {where(arguments)}")
    print("| method | trained | step | ratio | TFLOP | ratio | peak memory | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for method in methods:
        ratio = statistics.median(a / b for a, b in zip(seconds[method], seconds["LoRA"], strict=True))
        cells = [f"{parameters[method]:,}", f"{statistics.median(seconds[method]):.4f} s", f"{ratio:.3f}"]
        cells += [f"{flops[method] / 1e12:.3f}", f"{flops[method] / flops['LoRA']:.3f}"]
        cells += [f"{memory[method] / 1e9:.3f} GB", f"{memory[method] / memory['LoRA']:.3f}"]
        print(f"| {method} | {' | '.join(cells)} |")


class Step:
    """A model with an adapter, and one step of its training."""

    def __init__(self, method: str, arguments: argparse.Namespace) -> None:
        dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
        torch.manual_seed(0)
        if arguments.model in SHAPES:
            with device:
                base = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[arguments.model]), dtype=dtype)
        else:
            base = causal_lm(resolve(arguments.model), dtype, arguments.device)
        fixed = ":" in arguments.pattern
        gossamer.prune(base, "Magnitude", arguments.pattern, sparsity=None if fixed else 0.5)
        self.model = peft.get_peft_model(base, config(method, arguments.rank, arguments.pattern)).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.ids = torch.randint(base.config.vocab_size, (arguments.batch, arguments.seqlen), device=device)

    def __call__(self) -> float:
        synchronize(self.ids.device)
        started = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.ids.device)
        return time.perf_counter() - started

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def config(method: str, rank: int, pattern: str) -> Any:
    if method == "LoRA":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    if method == "PST":
        sparsity = None if ":" in pattern else 0.5
        return hf.PSTConfig(r=rank, steps=1, pattern=pattern, sparsity=sparsity)
    return getattr(hf, f"{method}Config")(r=rank)


def peak(method: str, arguments: argparse.Namespace) -> int:
    """Return the peak bytes of three steps: of the accelerator, or resident."""
    step = Step(method, arguments)
    gc.collect()
    restart_peak()
    for _ in range(3):
        step()
    found = peak_bytes()
    if arguments.device == "cuda":
        return found["accelerator"]
    with open("/proc/self/status", encoding="utf-8") as status:  # the high water mark since restart_peak
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def in_a_process(method: str) -> int:
    done = subprocess.run([sys.executable, *sys.argv, "--peak", method], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def where(arguments: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
