"""What the tests of tuners share: a loop, and what has to hold in the end."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

import gossamer
from gossamer.core.tuner import Tuning
from gossamer.sites._walk import targets
from tests.sites.families import ids


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    data = ids(seed=seed)
    loss: torch.Tensor = model(input_ids=data, labels=data).loss
    return loss


def train(tuning: Tuning, optimizer: torch.optim.Optimizer, steps: int, passes: int = 1) -> list[float]:
    """Train with accumulation and clipping; return the losses."""
    losses = []
    for _ in range(steps):
        for seed in range(passes):
            loss = loss_of(tuning.model, 0 if passes == 1 else seed) / passes
            loss.backward()
        nn.utils.clip_grad_norm_(tuning.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) * passes)
    return losses


def adamw(tuning: Tuning, rate: float = 1e-3, **more: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(tuning.parameters(), lr=rate, **{"weight_decay": 0.0, **more})


def check_plain(model: nn.Module, n: int = 2, m: int = 4) -> None:
    """Every target has at most ``n`` of ``m`` entries along its input, and nothing of the tuning is left."""
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    for target in targets(model):
        assert isinstance(getattr(target.module, target.attribute), nn.Parameter), target.name
        groups = (target.matrices() != 0).unflatten(-1, (-1, m)).sum(-1)
        assert int(groups.max()) <= n, target.name
        assert float((target.parameter == 0).float().mean()) < 0.6, target.name


def trainer(model: nn.Module, folder: Path, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(16)]
    quiet = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    settings = {**quiet, **sizes, "max_steps": 4, "save_strategy": "no", "dataloader_pin_memory": False, **more}
    return Trainer(model, TrainingArguments(**settings), train_dataset=rows)


def equal(a: nn.Module, b: nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


def packs(model: nn.Module) -> None:
    expected = model(ids()).logits
    report = gossamer.pack(model, "NM", pattern="2:4")
    assert all(row["format"] for row in report.weights)
    assert torch.allclose(model(ids()).logits, expected, atol=1e-4)
