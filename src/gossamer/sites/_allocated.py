"""What an allocation has to see of the dense model, and the sparsity of each target that it returns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import allocate as allocations
from gossamer.core.errors import GossamerError
from gossamer.core.score import Score
from gossamer.core.spec import show
from gossamer.core.stats import Stats
from gossamer.sites._bar import bar
from gossamer.sites._calibrate import Batch
from gossamer.sites._job import Job
from gossamer.sites._trials import Trials
from gossamer.sites._visit import visit_all
from gossamer.sites._walk import Target
from gossamer.sites._whole import losses


def allocated(
    model: nn.Module,
    job: Job,
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> dict[str, float | None]:
    """Return the sparsity of each target, after a pass over the dense model where the allocation wants one."""
    grain = job.pattern.grain
    if not job.pattern.takes_sparsity and (grain is None or job.allocation is allocations.uniform):
        return {target.name: None for target in chosen}
    tensors = {target.name: target.matrices() for target in chosen}
    more: list[Any] = []
    if job.scorer is not None:
        tensors = _dense_scores(model, job.scorer, chosen, batches, device, progress)
    with bar(None, "losses", progress if "losses" in job.allocation_needs else False) as shown:
        if "losses" in job.allocation_needs:
            more.append(losses(model, batches, shown.update))
        if "errors" in job.allocation_needs:
            more.append(lambda grid: _errors(model, job, grid, chosen, batches, device, progress))
        if "trials" in job.allocation_needs:
            more.append(Trials(model, job, chosen, batches, device, progress))
        try:
            found = dict(job.allocation(tensors, job.sparsity, *more))
        except ArithmeticError as error:
            raise GossamerError(f"allocate={show(job.allocation)}: {error}") from error
    if grain is None or job.sparsity is None:
        return found
    return dict(allocations.in_steps(found, {name: x.numel() for name, x in tensors.items()}, job.sparsity, grain))


def _dense_scores(
    model: nn.Module,
    score: Score,
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> dict[str, Tensor]:
    """Score every target on the dense model; all scores are held at once."""
    found: dict[str, Tensor] = {}
    with bar(len(chosen), f"scores by {score}", progress) as shown:

        def visit(target: Target, stats: list[Stats]) -> None:
            pairs = zip(target.matrices(), stats, strict=True)
            found[target.name] = torch.stack([score(w, s) for w, s in pairs]).to(target.parameter.device)
            shown.update()

        visit_all(model, score.needs, chosen, batches, device, visit, progress=progress)
    return {target.name: found[target.name] for target in chosen}


def _errors(
    model: nn.Module,
    job: Job,
    grid: Sequence[float],
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> dict[str, list[float]]:
    """Prune each target to every sparsity of the grid, aside, and return ‖(W − Ŵ) X‖² / ‖W X‖² on the dense model's inputs."""
    found: dict[str, list[float]] = {}
    with bar(len(chosen), "errors", progress) as shown:

        def visit(target: Target, stats: list[Stats]) -> None:
            errors, size = torch.zeros(len(grid), dtype=torch.float64), 0.0
            for w, known in zip(target.matrices(), stats, strict=True):
                gram = known.symmetric_gram()
                size += _energy(w, gram)
                for i, s in enumerate(grid):
                    errors[i] += _energy(w.float() - job.solve(w, known, s)[0].float(), gram) if s else 0.0
            found[target.name] = (errors / max(size, 1e-30)).tolist()
            shown.update()

        visit_all(model, job.gather | {"gram"}, chosen, batches, device, visit, progress=progress)
    return found


def _energy(w: Tensor, gram: Tensor) -> float:
    """‖W X‖² = tr(W G Wᵀ), G = X Xᵀ."""
    w = w.float()
    return float((w @ gram * w).sum(dtype=torch.float64))
