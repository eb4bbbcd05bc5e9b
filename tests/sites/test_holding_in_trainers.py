"""Holding the zeros in the loops people use: the Trainer, TRL's, accelerate's, and two processes under DDP and FSDP2."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gossamer
from gossamer.core.errors import GossamerError
from tests.sites.families import causal, ids
from tests.sites.test_holding import linears, loss_of, lost, train, zeros


@pytest.fixture
def pruned() -> Any:
    return prune_llama()


def prune_llama() -> Any:
    model = causal("llama").train()
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    return model


ROWS = [{"input_ids": row, "labels": row} for row in ids(16)]


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    return {**quiet, **sizes, "max_steps": 4, "save_strategy": "no", "dataloader_pin_memory": False, **more}


def trainer(model: nn.Module, folder: Path, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    return Trainer(model, TrainingArguments(**arguments(folder, **more)), train_dataset=ROWS)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
def test_trainer(pruned: Any, tmp_path: Path, optim: str) -> None:
    before, free = zeros(pruned), copy.deepcopy(pruned)
    trainer(free, tmp_path, optim=optim).train()
    assert lost(free, before) > 1000
    ours = trainer(pruned, tmp_path, optim=optim)
    with gossamer.hold(ours.model, ours.create_optimizer()) as held:
        ours.train()
    assert lost(pruned, before) == 0
    assert held.check().recipe["steps"] == 4


def test_trainer_resumes_bit_for_bit(pruned: Any, tmp_path: Path) -> None:
    base, before = copy.deepcopy(pruned), zeros(pruned)
    whole = trainer(pruned, tmp_path, save_strategy="steps", save_steps=2)
    gossamer.hold(whole.model, whole.create_optimizer())
    whole.train()
    again = trainer(base, tmp_path)
    gossamer.hold(again.model, again.create_optimizer())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert lost(base, before) == 0
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), base.parameters(), strict=True))


def test_a_callback_can_hold_what_the_trainer_made(pruned: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Hold(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.held = gossamer.hold(kwargs["model"], kwargs["optimizer"])

    before, ours, callback = zeros(pruned), trainer(pruned, tmp_path), Hold()
    ours.add_callback(callback)
    ours.train()
    assert lost(pruned, before) == 0
    assert callback.held.check().recipe["steps"] == 4


@pytest.mark.filterwarnings("ignore")  # TRL has warnings of its own, by the release
def test_trl(pruned: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    pytest.importorskip("trl")
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    tiny_tokenizer.pad_token = "</s>"
    (tmp_path / "prose.txt").write_text("The spider spins a thin thread.\n" * 16)
    text = load_dataset("text", data_files=str(tmp_path / "prose.txt"), cache_dir=str(tmp_path), split="train")
    before = zeros(pruned)
    config = SFTConfig(**arguments(tmp_path, bf16=False))
    ours = SFTTrainer(pruned, config, train_dataset=text, processing_class=tiny_tokenizer)
    with gossamer.hold(ours.model, ours.create_optimizer()) as held:
        ours.train()
    assert lost(pruned, before) == 0
    assert held.check().recipe["steps"] == 4


@pytest.mark.parametrize("first", [True, False])
def test_accelerate(pruned: Any, first: bool) -> None:
    from accelerate import Accelerator

    before, accelerator = zeros(pruned), Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-2)
    held = gossamer.hold(pruned, optimizer) if first else None
    model, optimizer = accelerator.prepare(pruned, optimizer)
    held = held or gossamer.hold(model, optimizer)
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids(seed=step), labels=ids(seed=step)).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert lost(pruned, before) == 0
    assert held.check().recipe["steps"] == 2


def ddp(rank: int, folder: str) -> None:
    for view in (False, True):
        model = prune_llama()
        before = zeros(model)
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
        held = gossamer.hold(wrapped, optimizer)
        train(wrapped, optimizer, first=10 * rank)
        assert lost(model, before) == 0
        loss_of(wrapped).backward()
        assert not any(int(p.grad[before[name]].count_nonzero()) for name, p in linears(model).items())
        assert held.check().totals["sparsity"] == 0.5
        assert all(name in before for name in held.state_dict()["masks"])
        held.release()
        train(wrapped, optimizer, 1)
        assert lost(model, before) > 1000


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    def whole(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.full_tensor() for name, p in linears(model).items()}

    def gone(model: nn.Module) -> int:
        return sum(int(((p != 0) & before[name]).sum()) for name, p in whole(model).items())

    model = prune_llama()
    before = zeros(model)
    model = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    held = gossamer.hold(model, optimizer)
    train(model, optimizer, 2, first=10 * rank)
    assert gone(model) == 0
    loss_of(model).backward()
    assert not any(int(p.grad.full_tensor()[before[name]].count_nonzero()) for name, p in linears(model).items())
    rows = {row["name"]: (row["shape"], row["nnz"]) for row in held.check().weights}
    assert rows == {name: ([*mask.shape], int((~mask).sum())) for name, mask in before.items()}  # of both ranks together
    for name, p in linears(model).items():
        for value in optimizer.state[p].values():
            assert value.ndim < 2 or int(value.full_tensor()[before[name]].count_nonzero()) == 0

    masks = held.state_dict()["masks"]
    assert all(torch.equal(masks[name].full_tensor(), ~mask) for name, mask in before.items())
    dcp.save({"masks": masks}, checkpoint_id=folder)
    read = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    dcp.load({"masks": read}, checkpoint_id=folder)
    held.load_state_dict({"steps": 2, "masks": read})
    train(model, optimizer, 1, first=10 * rank)
    assert gone(model) == 0
    held.release()
    train(model, optimizer, 1)
    assert gone(model) > 1000
    with pytest.raises(GossamerError, match="14 of 14 held weights lost zeros"):
        held.check()

    early = prune_llama()
    optimizer = torch.optim.AdamW(early.parameters())
    gossamer.hold(early, optimizer)
    optimizer.param_groups[0]["params"] = list(sharded(early).parameters())  # as accelerator.prepare does
    with pytest.raises(GossamerError, match=r"no longer updates model.layers.0.self_attn.q_proj.weight"):
        optimizer.step()


def process(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        work(rank, f"{folder}/checkpoint")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("work", [ddp, fsdp])
def test_two_processes(work: Callable[[int, str], None], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (work, str(tmp_path)), nprocs=2)
