"""The MLP of a block, for methods that solve its linears together: found by the coupling table, its activation by a trial.

The table says which linears make the channels and which reads them. What stands between is a child of the module that holds
these, without weights; it is the one by which the channels come out as the model itself makes them of real tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.mlp import Activation, between
from gossamer.sites._calibrate import hooked
from gossamer.sites._coupling import couplings, known
from gossamer.sites._walk import Target, blocks_of


@dataclass(frozen=True, eq=False)
class Linears:
    """The linears of one block's MLP.

    Attributes:
        owner: the module whose children they are.
        into: those that make the channels; where gated the gate's comes first.
        out: the one that reads them.
        gated: whether there are two outputs for each channel.
    """

    owner: nn.Module
    into: tuple[Target, ...]
    out: Target
    gated: bool

    @property
    def block(self) -> int:
        """The index of the block."""
        assert self.out.block is not None  # the table looks into blocks only
        return self.out.block

    @property
    def all(self) -> tuple[Target, ...]:
        """All of them."""
        return (*self.into, self.out)


@dataclass(frozen=True, eq=False)
class Wiring:
    """What a trial found of an MLP: its activation, and which of its linears the model calls first."""

    act: Activation
    first: Target


def mlps(model: nn.Module, chosen: Sequence[Target], who: str) -> dict[int, Linears]:
    """Return the MLP of each block that holds a target; the model may be without weights yet.

    Raises:
        GossamerError: a block has none that the table knows, or several, or not all of its linears are targets.
    """
    by_module = {target.module: target for target in chosen if not target.stacked}
    blocks, found = blocks_of(model)[1], {}
    for index in sorted({target.block for target in chosen if target.block is not None}):
        try:
            (coupling,) = couplings(model, [blocks[index]], "channels")
        except GossamerError:
            raise GossamerError(
                f"{who} solves a block's MLP as one, and block {index} of {type(model).__name__} has none, or several; "
                f"{known('channels')}"
            ) from None
        modules = [part.module for part in coupling.parts]
        if missing := [name for name, m in coupling.owner.named_children() if m in modules and m not in by_module]:
            raise GossamerError(
                f"{who} solves a block's MLP as one, and {', '.join(missing)} of block {index} is no target: give all of it"
            )
        into, gated = modules[:-1], sum(len(part.lots) for part in coupling.parts[:-1]) == 2
        found[index] = Linears(coupling.owner, tuple(by_module[m] for m in into), by_module[modules[-1]], gated)
    return found


@torch.no_grad()
def wired(linears: Sequence[Linears], run: Callable[[], Any], who: str) -> dict[int, Wiring]:
    """Return the wiring of some MLPs, by block, while ``run`` takes tokens through them.

    Raises:
        GossamerError: one does something else than two layers with an activation between, gated or not.
    """
    found: dict[int, Wiring] = {}
    with ExitStack() as stack:
        for mlp in linears:
            watch = _Watch(mlp, found)
            for target in mlp.into:
                stack.enter_context(hooked(target.module.register_forward_hook(watch.add)))
            stack.enter_context(hooked(mlp.out.module.register_forward_pre_hook(watch.judge)))
        run()
    for mlp in linears:
        if mlp.block not in found:
            raise GossamerError(
                f"{who} wants an MLP of two layers with an activation between, gated or not, and what comes to "
                f"{mlp.out.name} is no such thing: its block does more"
            )
    return found


class _Watch:
    """What the linears of an MLP put out in one call, until the last is called."""

    def __init__(self, mlp: Linears, found: dict[int, Wiring]) -> None:
        self.mlp, self.found = mlp, found
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen[module] = (args[0], output)

    def judge(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        mlp, seen = self.mlp, self.seen
        if mlp.block in self.found or len(seen) != len(mlp.into):
            return
        inputs = [x for x, _ in seen.values()]
        made = torch.cat([seen[target.module][1] for target in mlp.into], dim=-1)
        if all(x.shape == inputs[0].shape and torch.equal(x, inputs[0]) for x in inputs[1:]):
            act = next((child for child in mlp.owner.children() if self._does(child, made, args[0])), None)
            if act is not None:
                called = next(iter(seen))
                self.found[mlp.block] = Wiring(act, next(t for t in mlp.into if t.module is called))
        seen.clear()

    def _does(self, child: nn.Module, made: Tensor, channels: Tensor) -> bool:
        """Tell whether a child of the MLP is what stands between its layers, to rounding."""
        if next(child.parameters(), None) is not None:
            return False
        try:
            off = between(child, made, self.mlp.gated).float() - channels.reshape(*made.shape[:-1], -1).float()
        except (TypeError, RuntimeError):  # it takes something else than one tensor, or gives another shape
            return False
        size = torch.linalg.vector_norm(channels.float()).clamp_min(1e-30)
        return bool(torch.linalg.vector_norm(off) / size < torch.finfo(made.dtype).eps ** 0.5)
