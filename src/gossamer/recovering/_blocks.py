"""Reconstruction within `gossamer recover`: block by block, and on again after the last block that was kept."""

import time
from typing import Any

import torch
from torch import Tensor

from gossamer.recovering._loop import Job, Outcome
from gossamer.recovering._state import State
from gossamer.sites.reconstructing import Reconstruct


def by_blocks(job: Job, state: State) -> Outcome:
    """Refit the blocks that are left, each on the windows of all steps."""
    method, model, teacher = job.method, job.model, job.how.teacher
    assert isinstance(method, Reconstruct)
    assert teacher is not None
    with torch.no_grad():
        kept = state.tensors()
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    where = next(model.parameters()).device
    batches = [{"input_ids": ids.to(where)} for ids in job.plan.batches(job.text, 0)]
    begun, started = state.seconds, time.perf_counter()

    def after(index: int, rows: list[dict[str, Any]]) -> None:
        state.told.extend(rows)
        if time.perf_counter() - state.kept >= job.every:
            state.save(index + 1, _weights(job), begun + time.perf_counter() - started)

    method(
        model,
        teacher,
        batches,
        seed=job.plan.seed,
        targets=job.how.targets,
        progress=job.progress,
        start_at=state.step,
        after_block=after,
    )
    trained = sum(row["trained"] for row in state.told)
    return Outcome(model, begun + time.perf_counter() - started, trained, blocks=state.told)


def _weights(job: Job) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in job.model.named_parameters()}
