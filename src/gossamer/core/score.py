"""Score: the importance of each entry of a tensor, higher = keep."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from gossamer.core.stats import Stats


class Score(ABC):
    """A pure function of a weight and its `Stats`. Subclasses are `spec` classes: the object is its own configuration.

    Attributes:
        needs: what it reads of `Stats`: "norm", "mean", "gram", "cross", "grad", "grads"; empty for a data-free score.
        per: what its paper compares an entry with when the pattern leaves it open: the whole tensor or its output row.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    per: ClassVar[Literal["tensor", "row"]] = "tensor"

    @abstractmethod
    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        """Return the score of each entry: float32, the shape of x, (out, in)."""
