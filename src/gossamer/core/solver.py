"""Solver: chooses the mask and repairs the weights that stay. Factorizer: puts a product with a sparse factor there."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

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


class Factors(NamedTuple):
    """W = A·S·B: A and B block-diagonal, S sparse.

    Attributes:
        left: A's blocks, (out / h, h, h).
        core: S, (out, in), exactly zero where the pattern drops.
        right: B's blocks, (in / w, w, w).
    """

    left: Tensor
    core: Tensor
    right: Tensor


class Factorizer(ABC):
    """A method whose result is no masked weight but a product in the weight's place. Subclasses are `spec` classes.

    Attributes:
        needs, per, patterns: as a `Solver`'s; the pattern is the core's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    per: ClassVar[Literal["tensor", "row"]] = "tensor"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)

    @abstractmethod
    def check(self, shape: tuple[int, int], pattern: Pattern, name: str = "the weight") -> None:
        """Raise unless a weight of this shape, (out, in), can be factorized.

        Raises:
            GossamerError: what does not fit.
        """

    @abstractmethod
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> Factors:
        """Return the factors of w, of shape (out, in), in float32."""
