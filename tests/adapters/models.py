"""Pruned models of three bases, the configurations of all adapters, and a short training."""

from typing import Any

import peft
import torch
from torch import Tensor, nn

import gossamer
from gossamer import hf
from tests.sites.families import causal, ids

BASES = ["Unstructured", "2:4", "4x1"]
KEEPING = {
    "MaskLoRA": hf.MaskLoRAConfig,
    "ScaleLoRA": hf.ScaleLoRAConfig,
    "LoRAPrune": hf.LoRAPruneConfig,
    "SPP": hf.SPPConfig,
}
METHODS = [*KEEPING, "PST"]


def config(name: str, **more: Any) -> Any:
    return hf.PSTConfig(**{"r": 4, "steps": 3, "pattern": "2:4"} | more) if name == "PST" else KEEPING[name](**{"r": 4} | more)


def pruned(pattern: str = "2:4", family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model = causal(family, dtype, **more)
    gossamer.prune(model, "Magnitude", pattern, sparsity=None if pattern == "2:4" else 0.5)
    return model


def tuned(model: nn.Module, name: str, steps: int = 3, **more: Any) -> Any:
    """Return a peft model whose adapter has moved."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config(name, **more))
    train(wrapped, steps)
    return wrapped.eval()


def train(model: Any, steps: int = 3, rate: float = 1e-2) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    follow = getattr(model.base_model, "follow", None)  # peft's own have no schedule
    following = follow(optimizer) if follow else None
    model.train()
    for step in range(steps):
        loss = model(input_ids=ids(seed=step), labels=ids(seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if following:
        following.remove()
    model.eval()
    return float(loss.detach())


@torch.no_grad()
def logits(model: Any, seed: int = 9) -> Tensor:
    return model(input_ids=ids(seed=seed)).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices in the blocks, by their names in the plain model."""
    named = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    inside = (".layers.", ".h.", "layers.", "h.")
    return {
        n: p.detach().clone() for n, p in named.items() if p.ndim == 2 and "gossamer" not in n and any(i in n for i in inside)
    }


def same_zeros(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
