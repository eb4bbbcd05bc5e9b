"""What all allocations share: the declaration of needs, checks, and levelling to the total."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from gossamer.core.errors import GossamerError

Allocation = Callable[..., dict[str, float]]  # (tensors by name, sparsity, what it needs beside them) → sparsities by name
F = TypeVar("F", bound=Allocation)


def needs(*what: str) -> Callable[[F], F]:
    """Declare what the tensors given to an allocation have to be; nothing where their shapes are enough."""

    def declare(allocation: F) -> F:
        allocation.needs = frozenset(what)  # type: ignore[attr-defined]
        return allocation

    return declare


def sets_total(allocation: Any) -> bool:
    """Return whether the sparsity may be left out, as the allocation comes to a total of its own: its default is None."""
    function = getattr(allocation, "function", allocation)
    try:
        parameter = inspect.signature(function).parameters.get("sparsity")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise GossamerError(f"{name}: {bad} of {tensor.numel()} scores are NaN or infinite")


def level(wanted: Mapping[str, float], sizes: Mapping[str, int], mean: float, limits: tuple[float, float]) -> dict[str, float]:
    """Shift all of ``wanted`` by one number, within the limits, so that the mean weighted by size is ``mean``."""

    def shifted(by: float) -> dict[str, float]:
        return {name: min(max(value + by, limits[0]), limits[1]) for name, value in wanted.items()}

    low, high = limits[0] - max(wanted.values()), limits[1] - min(wanted.values())  # all at one limit, all at the other
    size = sum(sizes.values())
    for _ in range(100):
        middle = (low + high) / 2
        below = sum(sizes[name] * value for name, value in shifted(middle).items()) < mean * size
        low, high = (middle, high) if below else (low, middle)
    return shifted(high)


def block_of(name: str) -> str:
    """Return the block that a weight stands in, by its name: as far as the first number, or all of it."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:end])
