"""Prune what calibration hands over: each weight when its inputs are complete, or all of an MLP when those of its first are."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.format import Format
from gossamer.core.mlp import MLP, Activation, SolvesMLP
from gossamer.core.stats import Stats
from gossamer.sites._calibrate import Batch, Calibration, hooked
from gossamer.sites._job import Job, check_finite, show_method
from gossamer.sites._mlp import Linears, Wiring, mlps, wired
from gossamer.sites._permute import Permutation
from gossamer.sites._rows import row, told
from gossamer.sites._walk import Target

Done = tuple[Target, dict[str, Any], Format | None]


class Pruning:
    """One run over the targets: the sparsity of each, the orders of their inputs, and which are solved together.

    Args:
        sparsities: by the target's name; None where the pattern fixes its own.
    """

    def __init__(self, model: nn.Module, job: Job, chosen: Sequence[Target], sparsities: Mapping[str, float | None]) -> None:
        self.model, self.job, self.sparsities = model, job, sparsities
        self.permutation = Permutation(job)
        self.who = show_method(job.solver)
        self.mlps = mlps(model, chosen, self.who) if isinstance(job.solver, SolvesMLP) else {}
        self._mlp: tuple[Linears, Wiring] | None = None  # of the block in hand
        self._x: list[Tensor] = []  # what comes to it, a tensor a lane

    @contextmanager
    def block(self, walk: Calibration, index: int, inside: Sequence[Target]) -> Iterator[Sequence[Target]]:
        """Prepare for the targets of a block; give those whose inputs are to be gathered, and which are then pruned."""
        with self.permutation.block(walk, index, inside):
            mlp = self.mlps.get(index)
            if mlp is None:
                yield inside
                return
            through = lambda: walk.calls(index, mlp.out.module, answered=False, lanes=1)  # noqa: E731
            wiring = wired([mlp], through, self.who)[index]
            self._mlp = mlp, wiring
            others = set(mlp.all) - {wiring.first}
            try:
                with hooked(wiring.first.module.register_forward_pre_hook(lambda _m, args: self._x.append(args[0]))):
                    yield [target for target in inside if target not in others]
            finally:
                self._mlp = None
                self._x.clear()

    def prune(self, target: Target, stats: Sequence[Stats]) -> list[Done]:
        """Prune a weight in place, and those that are solved together with it; return each with its row and its product."""
        if self._mlp is not None and target is self._mlp[1].first:
            return self._together(*self._mlp, stats[0])
        order = self.permutation.order(target, stats)
        return [(target, *self.job.prune(target, stats, self.sparsities[target.name], order))]

    def _together(self, linears: Linears, wiring: Wiring, known: Stats) -> list[Done]:
        started = time.perf_counter()
        solver, out = self.job.solver, linears.out
        assert isinstance(solver, SolvesMLP)  # or there were no linears
        for target in linears.all:
            check_finite(target)
        own = [target.matrices()[0] for target in linears.into]
        sizes = [len(matrix) for matrix in own]
        last: dict[Target, Stats] = {}  # of each weight's input, as it was pruned last

        order: Tensor | None = None  # of the channels, which the last weight reads

        def solve(target: Target, w: Tensor, stats: Stats) -> Tensor:
            last[target] = stats
            return self.job.solved(target, w, stats, self.sparsities[target.name])[0]

        def first(w: Tensor, stats: Stats) -> Tensor:
            return torch.cat([solve(t, part, stats) for t, part in zip(linears.into, torch.split(w, sizes), strict=True)])

        def second(w: Tensor, stats: Stats) -> Tensor:
            if order is None:
                return solve(out, w, stats)
            return solve(out, w[:, order], stats.ordered(order))[:, order.argsort()]

        mlp = MLP(
            first=torch.cat(own).float(),
            second=out.matrices()[0].float(),
            first_bias=torch.cat([_bias(target) for target in linears.into]),
            second_bias=_bias(out),
            act=_apart(wiring.act),
            gated=linears.gated,
            x=tuple(x.reshape(-1, x.shape[-1]) for x in self._x),
            stats=known,
            prune_first=first,
            prune_second=second,
        )
        if getattr(self.job.pattern, "permute", False):
            dense = Stats(mlp.second.shape[1], device=mlp.second.device)
            for x in mlp.x:
                dense.add(mlp.inner(mlp.made(mlp.first, x)))
            order = self.permutation.order(out, [dense])
            mlp.notes.update(dense.notes)
        found = solver.mlp(mlp)
        for target, matrix in zip(linears.all, (*torch.split(found[0], sizes), found[1]), strict=True):
            target.matrices()[0].copy_(matrix)
        share = (time.perf_counter() - started) / len(linears.all)
        rows: list[Done] = [(t, {**row(t), **told([last[t]]), "seconds": share}, None) for t in linears.all]
        rows[-1][1].update(mlp.notes)
        return rows


@torch.no_grad()
def check_mlps(model: nn.Module, job: Job, chosen: Sequence[Target], batches: Sequence[Batch]) -> None:
    """Raise unless every MLP is what the method wants, by one pass of the first windows through a model that is there whole."""
    if isinstance(job.solver, SolvesMLP):
        who = show_method(job.solver)
        wired(list(mlps(model, chosen, who).values()), lambda: model(**batches[0], use_cache=False), who)


def _apart(act: Activation) -> Activation:
    """Return the activation as one that leaves its input as it was."""
    if getattr(act, "inplace", False):
        act = copy.copy(act)
        act.inplace = False  # type: ignore[attr-defined]
    return act


def _bias(target: Target) -> Tensor:
    """Return a linear's bias in float32, zeros where it has none."""
    bias: Any = getattr(target.module, "bias", None)
    rows = target.matrices().shape[1]
    return torch.zeros(rows, device=target.parameter.device) if bias is None else bias.data.float()
