"""Trials: the model with each target pruned to one of several sparsities, and how far it is then from the dense one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gossamer.core.stats import Stats
from gossamer.core.variants import Variants
from gossamer.sites._bar import bar
from gossamer.sites._calibrate import Batch
from gossamer.sites._divergence import Moved
from gossamer.sites._job import Job
from gossamer.sites._visit import visit_all
from gossamer.sites._walk import Target

DENSE = -1  # the number under which a target is kept as it was


class _Trial:
    """The targets at the levels that were taken last."""

    def __init__(self, measure: Moved, chosen: Sequence[Target], variants: Variants, shown: Any) -> None:
        self._measure, self._chosen, self._variants, self._shown = measure, chosen, variants, shown
        self._now = [DENSE] * len(chosen)

    def take(self, levels: Sequence[int]) -> None:
        for place, (target, level) in enumerate(zip(self._chosen, levels, strict=True)):
            if level != self._now[place]:
                target.matrices().copy_(self._variants.get(target.name, level))
        self._now = list(levels)

    def __call__(self, draw: int, tokens: int) -> float:
        found = self._measure(draw, tokens)
        self._shown.update()
        return found


@contextmanager
@torch.no_grad()
def trials(
    model: nn.Module,
    job: Job,
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
    grid: Sequence[float],
) -> Iterator[_Trial]:
    """Prune each target to every sparsity of the grid, aside and on the dense model; at the end all are what they were."""
    measure = Moved(model, batches)
    whole = [target for target in chosen if target.parameter.numel()]
    with Variants() as variants, bar(len(whole), "variants", progress) as shown:

        def visit(target: Target, stats: list[Stats]) -> None:
            dense = target.matrices()
            variants.put(target.name, DENSE, dense)
            for level, s in enumerate(grid):
                pruned = [job.solved(target, w, known, s)[0] for w, known in zip(dense, stats, strict=True)] if s else [*dense]
                variants.put(target.name, level, torch.stack(pruned))
            shown.update()

        visit_all(model, job.gather, whole, batches, device, visit, progress=progress)
        with bar(None, "divergences", progress) as told:
            trial = _Trial(measure, whole, variants, told)
            try:
                yield trial
            finally:
                trial.take([DENSE] * len(whole))
