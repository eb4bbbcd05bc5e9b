"""Mask: a score alone, the kept weights left as they are."""

from typing import Literal

from torch import Tensor

from gossamer.core.pattern import Pattern
from gossamer.core.score import Score
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Mask(Solver):
    """W ← W ⊙ M with M = pattern.select(score(W)). A score given where a method is wanted means this.

    >>> import torch
    >>> from gossamer.core.pattern import NM
    >>> from gossamer.scores import Magnitude
    >>> Mask(Magnitude())(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), Stats(4), NM(2, 4), None)[0]
    tensor([[ 0., -3.,  2.,  0.]])
    """

    score: Score

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """what its score needs"""
        return self.score.needs

    @property
    def per(self) -> Literal["tensor", "row"]:  # type: ignore[override]
        return self.score.per

    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        mask = pattern.select(self.score(w, stats), sparsity)
        return w.masked_fill(~mask, 0), mask
