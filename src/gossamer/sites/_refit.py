"""Refit a module to given outputs: its kept weights, by Adam, on float32 copies. The module itself changes only for the better.

The module runs on other tensors than its own (`torch.func.functional_call`), so that it needs no preparing and no restoring,
and its zeros are exact at every step, because what it runs on is always masked.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.core.errors import GossamerError
from gossamer.core.grid import held as dtype_of
from gossamer.core.grid import moved as regridded
from gossamer.core.grid import refound, rounded, tiles, untiled
from gossamer.sites._calibrate import Call, moved

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """What a module is called with, what the dense one answers, and which tokens count (bool, batch × tokens; None: all)."""

    call: Call
    answer: Tensor
    counted: Tensor | None = None


class Grid(NamedTuple):
    """What weights are rounded to: ``bits`` of each, groups of so many inputs under one scale and zero."""

    bits: int
    group: int


class Kept:
    """Every parameter is trained, what has a mask only where it is kept: W ⊙ M."""

    def __init__(self, start: Named, masks: Named, generator: torch.Generator) -> None:
        self.leaves = {name: w.requires_grad_() for name, w in start.items()}
        self._masks = masks

    def weights(self) -> Named:
        return {name: w * self._masks[name] if name in self._masks else w for name, w in self.leaves.items()}


class LowRank:
    """Each weight that has a mask gets an update of a low rank, masked: W + M ⊙ (BA), B = 0 at the start."""

    def __init__(self, start: Named, masks: Named, generator: torch.Generator, rank: int) -> None:
        self._start, self._masks = start, masks
        self.leaves: Named = {}
        for name in masks:
            w = start[name]
            *stack, rows, columns = w.shape
            a = torch.randn(*stack, rank, columns, generator=generator, dtype=w.dtype) / math.sqrt(columns)
            self.leaves[f"{name}.a"] = a.to(w.device).requires_grad_()
            self.leaves[f"{name}.b"] = w.new_zeros(*stack, rows, rank).requires_grad_()

    def weights(self) -> Named:
        updates = {n: m * (self.leaves[f"{n}.b"] @ self.leaves[f"{n}.a"]) for n, m in self._masks.items()}
        return self._start | {name: self._start[name] + update for name, update in updates.items()}


class Gridded(Kept):
    """Every parameter is trained, and what has a mask is seen as s·(q − z): its groups on grids of ``bits`` bits, trained too.

    Args:
        turned: the parameters that are stored (in, out).
        dtypes: what the parameters will be rounded to.
    """

    def __init__(
        self,
        start: Named,
        masks: Named,
        generator: torch.Generator,
        grid: Grid,
        turned: Collection[str],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._grid, self._turned, self._dtypes, self._grids = grid, turned, dtypes, dict[str, tuple[Tensor, Tensor]]()
        for name, mask in masks.items():
            self._grids[name] = refound(self._groups(name, start[name] * mask), grid.bits, dtypes[name])
        super().__init__(start, masks, generator)
        self._own = list(start)
        for name, (scale, zero) in self._grids.items():
            self.leaves[f"{name}.grown"] = torch.zeros_like(scale).requires_grad_()
            self.leaves[f"{name}.shifted"] = torch.zeros_like(zero).requires_grad_()

    def weights(self) -> Named:
        found = {name: self.leaves[name] for name in self._own}
        for name, (scale, zero) in self._grids.items():
            moves = self.leaves[f"{name}.grown"], self.leaves[f"{name}.shifted"]
            own = regridded(scale, zero, *moves, self._grid.bits, self._dtypes[name])
            rough = untiled(rounded(self._groups(name, found[name]), *own, self._grid.bits), 1, self._grid.group)
            found[name] = (rough.mT if name in self._turned else rough) * self._masks[name]
        return found

    def _groups(self, name: str, w: Tensor) -> Tensor:
        return tiles(w.mT if name in self._turned else w, 1, self._grid.group)


def refit(
    module: nn.Module,
    masks: Named,
    fit: Sequence[Example],
    held: Sequence[Example],
    *,
    epochs: int,
    rate: float,
    rank: int | None,
    generator: torch.Generator,
    device: torch.device,
    tell: Callable[[float], None],
    grid: Grid | None = None,
    turned: Collection[str] = (),
) -> dict[str, Any]:
    """Minimise ‖f(x) − y‖² / ‖y‖² over the module's kept weights, and keep the result if it is better on ``held``.

    Args:
        module: f; its parameters are written only at the end.
        masks: by parameter name, bool, True = kept.
        fit, held: what is trained on, an example a step, and what is judged by.
        epochs, rate: passes over ``fit``, in random order, and Adam's rate, which falls to 0 as a cosine.
        rank: of a low-rank update; None trains every parameter.
        device: where the work is done.
        tell: is given the error after each step.
        grid: what kept weights are rounded to, if anything; always: where training brings nothing, as at its start.
        turned: the parameters that are stored (in, out).

    Returns:
        ``before`` and ``after`` (errors on ``held``; equal where the weights stay as they were), ``steps``, and two counts:
        ``trained`` parameters, and ``raised`` kept weights, which would have rounded to zero.

    Raises:
        GossamerError: an error is not finite; the module is as it was.
    """
    masks = {name: mask.to(device) for name, mask in masks.items()}
    start = {name: full(p.detach().to(device, copy=True)) for name, p in module.named_parameters()}
    buffers = {name: full(b.to(device)) for name, b in module.named_buffers()}

    def error(weights: Named, example: Example) -> tuple[Tensor, Tensor]:
        """Return ‖f(x) − y‖² and ‖y‖²."""
        args, kwargs = (full(moved(part, device)) for part in example.call[:2])
        wanted = full(example.answer.to(device))
        given = hidden(functional_call(module, weights | buffers, args, kwargs))
        if example.counted is not None:
            given, wanted = (x[example.counted.to(device)] for x in (given, wanted))
        return (given - wanted).square().sum(), wanted.square().sum()

    @torch.no_grad()
    def judged(weights: Named) -> float:
        pairs = [torch.stack(error(weights, example)) for example in held]
        apart, size = torch.stack(pairs).sum(0)
        return float(apart / size)

    own = dict(module.named_parameters())

    @torch.no_grad()
    def stored() -> dict[str, tuple[Tensor, int]]:
        """Return what would be in the parameters now. On a grid 0 is a value as any other, and none is raised."""
        floors = masks if grid is None else {}
        return {name: _stored(w, floors.get(name), own[name].dtype) for name, w in trained.weights().items()}

    trained: Kept | LowRank
    if grid is not None:
        dtypes = {name: dtype_of(p.detach()) for name, p in own.items()}  # a model of 16 bits may be here in float32
        trained = Gridded(start, masks, generator, grid, turned, dtypes)
        first = {name: (w.clone(), count) for name, (w, count) in stored().items()}  # float32 ones are what is trained
        before = finite(judged({name: full(w) for name, (w, _) in first.items()}), "before any step")
    else:
        first = {}
        before = finite(judged(start), "before any step")
        trained = Kept(start, masks, generator) if rank is None else LowRank(start, masks, generator, rank)
    steps = epochs * len(fit)
    optimizer = torch.optim.Adam(trained.leaves.values(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, steps))
    for step, example in enumerate(_shuffled(fit, epochs, generator)):
        with torch.enable_grad():
            apart, size = error(trained.weights(), example)
            loss = apart / size
            loss.backward()  # type: ignore[no-untyped-call]
        tell(finite(loss.item(), f"at step {step + 1} of {steps}; a lower rate than {rate:g} may do"))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    with torch.no_grad():
        found = stored()
        after = judged({name: full(w) for name, (w, _) in found.items()})
        better = after < before  # false for NaN too
        for name, (w, _) in (found if better else first).items():
            own[name].copy_(w)
    raised = sum(count for _, count in found.values()) if better else 0
    count = sum(leaf.numel() for leaf in trained.leaves.values())
    return {"before": before, "after": after if better else before, "steps": steps, "trained": count, "raised": raised}


def hidden(output: Any) -> Tensor:
    """Return the hidden states that a block or a part of one puts out, alone or first of several."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def full(value: Any) -> Any:
    """Return floating tensors of 16 bits, in nested tuples, lists and dicts, in float32, and everything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.itemsize < 4 else value
    if isinstance(value, tuple | list):
        return type(value)(full(v) for v in value)
    if isinstance(value, dict):
        return {k: full(v) for k, v in value.items()}
    return value


def finite(value: float, when: str) -> float:
    """Return the error, or raise if it is none."""
    if not math.isfinite(value):
        raise GossamerError(f"the error is NaN or infinite {when}")
    return value


def _rate(step: int, steps: int) -> float:
    """Return the share of the rate: a rise over the first tenth, and a cosine down to 0."""
    return min((step + 1) / max(steps // 10, 1), (1 + math.cos(math.pi * step / steps)) / 2)


def _shuffled(examples: Sequence[Example], epochs: int, generator: torch.Generator) -> Iterator[Example]:
    for _ in range(epochs):
        for index in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[index]


def _stored(w: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Round a weight to its dtype; a kept entry that would become zero becomes the smallest normal number instead."""
    rounded = w.to(dtype)
    if mask is None:
        return rounded, 0
    gone = mask & (rounded == 0)
    least = torch.finfo(dtype).tiny
    return rounded.where(~gone, torch.where(w < 0, -least, least).to(dtype)), int(gone.sum())
