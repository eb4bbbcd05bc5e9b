"""Schedules: a value over training steps, clamped outside [begin, begin + steps]."""

import math
from abc import ABC, abstractmethod

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec

__all__ = ["Constant", "Cosine", "Cubic", "Linear"]


class _Ramp(ABC):
    start: float
    end: float
    steps: int
    begin: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise GossamerError(f"a schedule runs over at least one step; got {self.steps}")

    def __call__(self, step: int) -> float:
        t = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.start + (self.end - self.start) * self._progress(t)

    @abstractmethod
    def _progress(self, t: float) -> float: ...


@spec
class Constant:
    """The same value at every step.

    >>> Constant(0.5)(7)
    0.5
    """

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@spec
class Linear(_Ramp):
    """s(t) = start + (end − start)·t with t = (step − begin) / steps.

    >>> Linear(0.0, 0.5, steps=10)(5)
    0.25
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def _progress(self, t: float) -> float:
        return t


@spec
class Cubic(_Ramp):
    """s(t) = end + (start − end)·(1 − t)³: fast first, slow as it nears the end (Zhu and Gupta, 2017, arXiv:1710.01878).

    >>> round(Cubic(0.0, 0.8, steps=10)(5), 3)
    0.7
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def _progress(self, t: float) -> float:
        return 1 - (1 - t) ** 3


@spec
class Cosine(_Ramp):
    """s(t) = end + (start − end)·(1 + cos πt) / 2.

    >>> round(Cosine(0.3, 0.0, steps=10)(5), 3)
    0.15
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def _progress(self, t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2
