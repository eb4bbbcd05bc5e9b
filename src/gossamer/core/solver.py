"""Solver: chooses the mask and repairs the weights that stay. Factorizer: puts a product with a sparse factor there."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern
from gossamer.core.score import Score
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


class Around(Solver):
    """A solver that gives another method something else than what it would see: it is defined for what that one is."""

    method: Score | Solver

    def __post_init__(self) -> None:
        if not isinstance(self.method, Score | Solver):
            name = type(self).__name__
            raise GossamerError(f"{name}(method) is a score or a solver, such as {name}(ALPS()); got {self.method!r}")

    @property
    def per(self) -> Literal["tensor", "row"]:  # type: ignore[override]
        return self.method.per

    @property
    def patterns(self) -> tuple[type[Pattern], ...]:  # type: ignore[override]
        """its method's"""
        return self.method.patterns if isinstance(self.method, Solver) else (Pattern,)

    def inside(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        """Return what the method makes of a weight; of a score, the weight where its mask is."""
        if isinstance(self.method, Solver):
            return self.method(w, stats, pattern, sparsity)
        mask = pattern.select(self.method(w, stats), sparsity)
        return w.masked_fill(~mask, 0), mask
