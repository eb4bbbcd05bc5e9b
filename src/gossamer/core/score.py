"""Score: the importance of each entry of a tensor, higher = keep."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from gossamer.core.stats import Stats


class Score(ABC):
    """A pure function of a weight and its `Stats`. Subclasses are `spec` classes: the object is its own configuration.

    Attributes:
        needs: what it reads of `Stats`: "norm", "mean", "gram", "cross", "dense", "grad", "square_grad", "grads",
            "hessian_grad", "synflow"; empty where the weight is enough.
        per: what its paper compares an entry with when the pattern leaves it open: the whole tensor or its output row.
        rounds: in how many rounds the sparsity is reached: after round k the density is (1 − S)^(k/rounds), and the next round
            scores what is left anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    per: ClassVar[Literal["tensor", "row"]] = "tensor"
    rounds: int = 1

    @abstractmethod
    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        """Return the score of each entry: float32, the shape of x, (out, in)."""
