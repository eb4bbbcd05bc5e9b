"""Methods for the tests: what goes is said, not found."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gossamer.core.spec import spec
from gossamer.core.structure import Group, Skeleton, Structure


@spec
class Keep(Structure):
    """Keep so many members of a kind in each block, by block; the last ones, so that an order would show."""

    kind: str = "channels"
    left: tuple[int, ...] = ()
    removes: ClassVar[frozenset[str]] = frozenset({"channels", "heads"})
    needs: ClassVar[frozenset[str]] = frozenset({"states"})

    def __call__(self, model: Skeleton, sparsity: float) -> None:
        for group, n in zip(model.groups(self.kind), self.left, strict=True):
            model.keep(group, torch.arange(group.count - n, group.count))


@spec
class KeepHeads(Keep):
    """The same of heads, in models whose MLP may be none."""

    kind: str = "heads"
    removes: ClassVar[frozenset[str]] = frozenset({"heads"})


@spec
class KeepChannels(Keep):
    """The same of channels alone."""

    removes: ClassVar[frozenset[str]] = frozenset({"channels"})


@spec
class Drop(Structure):
    """Drop these blocks."""

    blocks: tuple[int, ...] = ()
    removes: ClassVar[frozenset[str]] = frozenset({"blocks"})

    def __call__(self, model: Skeleton, sparsity: float) -> None:
        model.drop(list(self.blocks))


def group_of(out: Tensor, *into: Tensor, count: int | None = None, kind: str = "channels") -> Group:
    """Make a group of loose matrices."""
    count = out.shape[1] if count is None else count
    return Group(kind, 0, count, (out.numel() + sum(w.numel() for w in into)) // count, out, into)


def operations(run: Callable[[int], Any], device: torch.device, turns: int) -> float:
    """Count what a call multiplies and adds: takes the place of the clock where times would be measured."""
    with FlopCounterMode(display=False) as counter:
        run(0)
    return float(counter.get_total_flops())
