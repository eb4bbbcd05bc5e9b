"""Trials: the model with each target pruned to one of several sparsities, and how far it is then from the dense one."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
                self._now[place] = level  # before: where copying fails, it is not what it was
                target.matrices().copy_(self._variants.get(target.name, level))

    def __call__(self, draw: int, tokens: int) -> float:
        found = self._measure(draw, tokens)
        self._shown.update()
        return found


@dataclass(frozen=True)
class Trials:
    """What `evolved` is given: see `gossamer.core.allocate`."""

    model: nn.Module
    job: Job
    chosen: Sequence[Target]
    batches: Sequence[Batch]
    device: torch.device | None
    progress: bool | None

    def allows(self, sparsity: float) -> bool:
        """Whether the pattern can take the sparsity: of n:m those with 0 < n < m."""
        m = self.job.pattern.grain
        if m is None:
            return 0 <= sparsity < 1
        return math.isclose(sparsity * m, round(sparsity * m), abs_tol=1e-6) and 0 < round(sparsity * m) < m

    @contextmanager
    @torch.no_grad()
    def __call__(self, grid: Sequence[float]) -> Iterator[_Trial]:
        """Prune each target to every sparsity, aside and on the dense model; at the end all are what they were."""
        measure = Moved(self.model, self.batches)
        whole = [target for target in self.chosen if target.parameter.numel()]
        with Variants() as variants, bar(len(whole), "variants", self.progress) as shown:

            def visit(target: Target, stats: list[Stats]) -> None:
                dense = target.matrices()
                variants.put(target.name, DENSE, dense, dense.dtype)
                for level, s in enumerate(grid):
                    pairs = zip(dense, stats, strict=True)
                    pruned = [self.job.solved(target, w, known, s)[0] if s else w for w, known in pairs]
                    variants.put(target.name, level, torch.stack(pruned))
                shown.update()

            visit_all(self.model, self.job.gather, whole, self.batches, self.device, visit, progress=self.progress)
            with bar(None, "divergences", self.progress) as told:
                trial = _Trial(measure, whole, variants, told)
                try:
                    yield trial
                finally:
                    trial.take([DENSE] * len(whole))
