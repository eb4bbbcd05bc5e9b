"""Solver: chooses the mask and repairs the weights that stay."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from gossamer.core.pattern import Pattern
from gossamer.core.stats import Stats


class Solver(ABC):
    """A method that returns new weights with their mask. Subclasses are `spec` classes.

    Attributes:
        needs: what it reads of `Stats`.
        per: the comparison group where the pattern leaves it open.
        patterns: the patterns it is defined for.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    per: ClassVar[Literal["tensor", "row"]] = "tensor"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)

    @abstractmethod
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        """Return (weights, mask), both of the shape of w, (out, in); weights are exactly zero where the mask is False."""
