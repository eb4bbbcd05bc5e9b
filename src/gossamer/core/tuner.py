"""Tuner: a way of training a pruned model, or one that is becoming sparse, that ends with exact zeros."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.pattern import Pattern


class Tuner(ABC):
    """A method by which a model is trained and stays, or becomes, sparse. Subclasses are `spec` classes.

    Attributes:
        rate: the learning rate that is meant where none is given.
        chooses: whether it finds the mask itself, and so wants a pattern; the others keep the zeros that are there.
        patterns: the patterns it is defined for.
    """

    rate: ClassVar[float] = 1e-4
    chooses: ClassVar[bool] = False
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)

    @abstractmethod
    def start(self, model: nn.Module, how: "How") -> "Tuning":
        """Prepare a model in place; nothing is changed if a `GossamerError` is raised."""


@dataclass(frozen=True)
class How:
    """What a tuner is told beside the model.

    Attributes:
        steps: how many optimizer steps there will be.
        pattern, sparsity: what the zeros are to follow, for a tuner that chooses the mask.
        targets: which weights, as in `prune`.
        teacher: the dense model, where there is one.
        whole: the model is a dense one that was shrunk: it has no zeros to hold.
    """

    steps: int
    pattern: Pattern | None = None
    sparsity: float | None = None
    targets: str | None = None
    teacher: nn.Module | None = None
    whole: bool = False


class Tuning(ABC):
    """A model in training: what to call, what to train, and how it ends.

    Attributes:
        model: what the loop calls; it may be another object than the model that was given (peft's around it).
    """

    model: nn.Module

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained: what the optimizer is made of."""

    @abstractmethod
    def attach(self, optimizer: Optimizer) -> Self:
        """Hook to an optimizer made of ``parameters()``: from now on each of its steps keeps to the method."""

    @abstractmethod
    def finish(self) -> nn.Module:
        """End: take every hook away, merge what was added, and return the plain model with its exact zeros.

        Raises:
            GossamerError: a zero was lost.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return, flat, everything but the optimizer's state that is needed to go on with the very same bits."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of an earlier tuning of the same model by the same method, after ``attach``."""
