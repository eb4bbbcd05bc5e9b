"""Masks learned by two processes under DDP, each with text of its own: the same masks and the same weights in both."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gossamer
from tests.sites.families import causal
from tests.tuners.loops import adamw, check_plain, loss_of
from tests.tuners.test_masks import METHODS


def ddp(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for method in METHODS:
            tuning = gossamer.tune(causal("llama").train(), method, "2:4", steps=4)
            wrapped = nn.parallel.DistributedDataParallel(tuning.model, gradient_as_bucket_view=True)
            optimizer = adamw(tuning)
            tuning.attach(optimizer)
            for step in range(4):
                loss_of(wrapped, 10 * rank + step).backward()
                optimizer.step()
                optimizer.zero_grad()
            model = tuning.finish()
            check_plain(model)
            for parameter in model.parameters():
                other = parameter.detach().clone()
                dist.broadcast(other, 0)
                assert torch.equal(parameter, other)
    finally:
        dist.destroy_process_group()


def test_ddp(tmp_path: Path) -> None:
    if not dist.is_available():
        pytest.skip("torch has no distributed")
    torch.multiprocessing.spawn(ddp, (str(tmp_path),), nprocs=2)
