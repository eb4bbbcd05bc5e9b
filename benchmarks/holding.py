"""What holding a mask costs of a training step: python benchmarks/holding.py [MODEL] [--repeats N]

A step is forward, backward, clipping and AdamW in float32. Steps with and without the hold alternate, on one model in one
process; the figures are medians.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.models import causal_lm, resolve

LIKE_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a directory, a hub id or smollm2; by default random weights of its shape")
    parser.add_argument("--adamw", default="fused,foreach,plain", help="which implementations of AdamW")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model:
        model = causal_lm(resolve(arguments.model), torch.float32, arguments.device)
    else:
        model = LlamaForCausalLM(LlamaConfig(**LIKE_SMOLLM2)).to(arguments.device)
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    model.train()
    ids = torch.randint(model.config.vocab_size, (arguments.batch, arguments.seqlen), device=arguments.device)
    print("| AdamW | tokens | step | with the hold | ratio |")
    print("|---|---|---|---|---|")
    for kind in arguments.adamw.split(","):
        chosen = {"fused": kind == "fused", "foreach": kind == "foreach"}
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, **chosen
        )  # at 0 the steps without the hold leave the zeros too
        without, held, ratio = compare(model, optimizer, ids, arguments.repeats)
        size = f"{arguments.batch}×{arguments.seqlen}"
        print(f"| {kind} | {size} | {without:.4f} s | {held:.4f} s | {ratio:.3f} |", flush=True)


def compare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, repeats: int) -> tuple[float, ...]:
    """Return the median seconds of a step without and with the hold, and the median ratio of two that follow one another."""

    def step() -> float:
        synchronize(ids.device)
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(ids.device)
        return time.perf_counter() - started

    step()
    plain, held = [], []
    for repeat in range(repeats):
        for holds in (repeat % 2 == 0, repeat % 2 == 1):
            if holds:
                with gossamer.hold(model, optimizer):
                    step()  # the first masks the optimizer's state too
                    held.append(step())
            else:
                plain.append(step())
    ratios = [with_hold / without for without, with_hold in zip(plain, held, strict=True)]
    return statistics.median(plain), statistics.median(held), statistics.median(ratios)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
