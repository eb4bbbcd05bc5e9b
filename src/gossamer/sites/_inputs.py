"""Calibration inputs: from text, token ids or mappings to the model's keyword arguments, a mapping a lane."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.spec import show
from gossamer.evaluate import check_ids
from gossamer.sites._calibrate import Batch
from gossamer.sites._job import Job, show_method


def calibration_batches(
    job: Job,
    data: str | Path | Tensor | Sequence[Batch] | None,
    tokenizer: Any,
    seqlen: int,
    samples: int,
    sample: str,
    seed: int,
    lanes: int,
    *,
    folder: str | Path,
    device: torch.device,
) -> list[Batch]:
    """Return the model's keyword arguments for each lane; none where the method needs no data.

    ``folder`` is where the tokenizer is, if text comes without one; ``device`` where the model takes its inputs.
    """
    if not job.needs_data:
        return []
    job.check_data(data)
    assert data is not None  # checked above
    split = lambda ids: ids.tensor_split(min(lanes, len(ids)))  # noqa: E731
    batches = batches_of(data, tokenizer, seqlen, samples, sample, seed, split, folder=folder, device=device)
    losses = {"grad", "square_grad", "grads", "hessian_grad", "losses", "trials"}
    if job.wants & losses and not all("input_ids" in batch for batch in batches):
        wants = show_method(job.solver) if job.gather & losses else f"allocate={show(job.allocation)}"
        raise GossamerError(f"{wants} takes the next-token loss, so each mapping needs input_ids")
    return batches


def batches_of(
    data: str | Path | Tensor | Sequence[Batch],
    tokenizer: Any,
    seqlen: int,
    samples: int,
    sample: str,
    seed: int,
    split: Callable[[Tensor], Sequence[Tensor]],
    *,
    folder: str | Path,
    device: torch.device,
) -> list[Batch]:
    """Return the model's keyword arguments for each part into which ``split`` takes the windows; mappings stay as given."""
    if isinstance(data, str | Path):
        from gossamer.data import calibration

        tokenizer = tokenizer or _tokenizer_of(str(folder))
        data = calibration(data, tokenizer, seqlen=seqlen, samples=samples, sample=sample, seed=seed)  # type: ignore[arg-type]
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.numel() == 0 or data.is_floating_point():
            raise GossamerError(f"token ids are integers of shape (samples, seqlen); got {data.dtype} {tuple(data.shape)}")
        return [{"input_ids": ids.to(device)} for ids in split(data)]
    batches = list(data)
    if not batches or not all(isinstance(batch, Mapping) for batch in batches):
        raise GossamerError("data= wants text, token ids of shape (samples, seqlen), or mappings of the model's arguments")
    return batches


def _tokenizer_of(name: str) -> Any:
    """Load the tokenizer of the directory or hub id that a model says it came from."""
    from gossamer.models import resolve, tokenizer

    if not name:
        raise GossamerError("text needs a tokenizer, and this model does not say where it came from: give tokenizer=")
    return tokenizer(Path(name) if Path(name).is_dir() else resolve(name))


def check_batches(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise GossamerError if token ids do not fit the model: its context, its vocabulary."""
    for batch in batches:
        if isinstance(ids := batch.get("input_ids"), Tensor):
            check_ids(model, ids)
