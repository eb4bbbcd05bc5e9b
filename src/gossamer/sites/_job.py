"""A pruning job: method, pattern, sparsity and allocation, read and checked before anything is touched."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import formats, scores, solvers
from gossamer.core import allocate as allocations
from gossamer.core import pattern as patterns
from gossamer.core.errors import GossamerError
from gossamer.core.format import Format
from gossamer.core.mlp import SolvesMLP
from gossamer.core.pattern import Pattern, Unstructured, not_finite
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Factors, Solver
from gossamer.core.spec import names_in, parse, show
from gossamer.core.stats import INPUTS, Stats
from gossamer.sites._mlp import mlps
from gossamer.sites._rows import row, told, wrapped
from gossamer.sites._walk import Target, targets

METHODS = {**names_in(scores), **names_in(solvers)}
PATTERNS = names_in(patterns, Pattern)
ALLOCATIONS = names_in(allocations)
WHOLE = frozenset({"grad", "square_grad", "grads", "hessian_grad", "synflow"})  # what only the whole model can tell
DATA_FREE = frozenset({"synflow", "weights", "scores", "wanda"})  # needs for which themselves no data is read


@dataclass(frozen=True)
class Job:
    """What to do to each weight: the method, the pattern and the sparsity, read and checked before anything is touched."""

    solver: Solver | Factorizer
    pattern: Pattern
    sparsity: float | None
    allocation: Any

    @classmethod
    def of(
        cls,
        method: str | Score | Solver | Factorizer,
        pattern: str | Pattern,
        sparsity: float | None = None,
        allocate: Any = "uniform",
    ) -> "Job":
        """Read the specs.

        Raises:
            GossamerError: an unknown name, a pattern the method is not defined for, a sparsity that does not fit.
        """
        chosen = parse(method, METHODS, "method") if isinstance(method, str) else method
        solver = solvers.Mask(chosen) if isinstance(chosen, Score) else chosen
        if not isinstance(solver, Solver | Factorizer):
            raise GossamerError(f"{method!r} is no method: it wants a Score, a Solver or a Factorizer")
        inner = getattr(solver, "init", None) or getattr(solver, "method", None)
        if getattr(inner, "rounds", 1) > 1:
            raise GossamerError(f"{show(inner)} reaches a sparsity in rounds, which no method around it does: take it alone")
        if isinstance(inner, SolvesMLP):
            raise GossamerError(f"{show(inner)} solves a block's MLP as one, which no method around it does: take it alone")
        shape = pattern_of(pattern)
        if not isinstance(shape, solver.patterns):
            known = ", ".join(p.__name__ for p in solver.patterns)
            raise GossamerError(f"{show_method(solver)} is defined for the patterns {known}, not for {shape}")
        if shape == Unstructured():
            shape = Unstructured(per=solver.per)
        if getattr(shape, "permute", False) and (solver.needs & WHOLE or isinstance(solver, Factorizer)):
            why = "puts a product there" if isinstance(solver, Factorizer) else "reads gradients"
            raise GossamerError(
                f"{shape} orders the inputs of single weights, and {show_method(solver)} {why}: leave permute out"
            )
        allocation = _allocation(allocate)
        own_total = shape.takes_sparsity and allocations.sets_total(allocation)
        fraction = None if own_total and sparsity is None else shape.resolve(sparsity)
        if not shape.takes_sparsity and shape.grain is None and allocation is not allocations.uniform:
            raise GossamerError(f"the pattern {shape} leaves no sparsity to allocate; leave allocate={show(allocation)} out")
        job = cls(solver, shape, fraction, allocation)
        if getattr(shape, "permute", False) and "trials" in job.allocation_needs:
            raise GossamerError(f"allocate={show(allocation)} tries weights in the order they have: leave permute out")
        if "scores" in job.allocation_needs and job.scorer is None:
            raise GossamerError(
                f"allocate={show(allocation)} ranks the scores of all weights together, and {show_method(solver)} has none "
                f"outside its own sweep; use uniform, erk or owl with it, or by(Wanda, {show(allocation)})"
            )
        return job

    @property
    def gather(self) -> frozenset[str]:
        """What calibration has to gather for the method itself."""
        return self.solver.needs | (frozenset({"norm"}) if getattr(self.pattern, "permute", False) else frozenset())

    @property
    def blockwise(self) -> bool:
        """Whether each block can be pruned knowing only itself and what comes before it."""
        return not self.gather & WHOLE and not self.allocation_needs

    @property
    def allocation_needs(self) -> frozenset[str]:
        """What the allocation wants to see of every weight before the first one is pruned."""
        return getattr(self.allocation, "needs", frozenset())

    @property
    def scorer(self) -> Score | None:
        """The score that the allocation reads: its own, Wanda, or the method's; None where it reads none, or there is none."""
        if not self.allocation_needs & {"scores", "wanda"}:
            return None
        if "wanda" in self.allocation_needs:
            return scores.Wanda()
        own = self.solver.score if isinstance(self.solver, solvers.Mask) else None
        return getattr(self.allocation, "score", own)

    @property
    def rounds(self) -> int:
        """In how many rounds the sparsity is reached: one where it cannot rise, as the pattern or a mapping fixes it."""
        rising = self.sparsity and self.pattern.takes_sparsity and not isinstance(self.allocation, allocations.mapping)
        return self.solver.score.rounds if isinstance(self.solver, solvers.Mask) and rising else 1

    @property
    def needs_data(self) -> bool:
        """Whether calibration windows are wanted at all."""
        return bool(self.wants - DATA_FREE)

    @property
    def wants(self) -> frozenset[str]:
        """Everything that the method, the allocation and its score need."""
        return self.gather | self.allocation_needs | (self.scorer.needs if self.scorer else frozenset())

    def check_data(self, data: Any) -> None:
        """Raise if data is wanted and there is none."""
        if self.needs_data and data is None:
            wants = show_method(self.solver) if self.gather - DATA_FREE else f"allocate={show(self.allocation)}"
            raise GossamerError(f"{wants} needs calibration data: give data= a text file, token ids, or 'builtin'")

    @property
    def factorizes(self) -> bool:
        """Whether a product comes in each weight's place: a `SparseLinear` that holds a `Wrapped`."""
        return isinstance(self.solver, Factorizer)

    def check(self, target: Target) -> None:
        """Raise unless the weight can be pruned so."""
        shape = target.matrices().shape[1:]
        self.pattern.check(shape, target.name)
        if isinstance(self.solver, Factorizer):
            if target.stacked or target.block is None:
                kind = "a stack of experts" if target.stacked else "outside the blocks"
                told = "puts a product in the place of a linear inside the blocks"
                raise GossamerError(f"{show_method(self.solver)} {told}, and {target.name} is {kind}: leave it out of targets=")
            self.solver.check((shape[0], shape[1]), self.pattern, target.name)

    def prune(
        self, target: Target, stats: Sequence[Stats], sparsity: float | None, order: Tensor | None = None
    ) -> tuple[dict[str, Any], Format | None]:
        """Prune one weight in place, its inputs taken in ``order`` (in,).

        Return its row of the report, and of a method that factorizes the product.
        """
        started = time.perf_counter()
        check_finite(target)
        matrices = target.matrices()
        packed = None
        if order is not None:
            matrices, stats = matrices[..., order], [known.ordered(order) for known in stats]
        for matrix, known in zip(matrices, stats, strict=True):
            weights, packed = self.solved(target, matrix, known, sparsity)
            matrix.copy_(weights)
        if order is not None:
            target.matrices().copy_(matrices[..., order.argsort()])
        found_row = {**row(target), **told(stats)}
        if packed is not None:
            found_row |= wrapped(target, packed)
        return {**found_row, "seconds": time.perf_counter() - started}, packed

    def solved(
        self, target: Target, matrix: Tensor, known: Stats, sparsity: float | None
    ) -> tuple[Tensor, formats.Wrapped | None]:
        """Do as `solve` does, with one matrix of a target or one in its place; whatever goes wrong names the target."""
        try:
            weights, packed = self.solve(matrix, known, sparsity)
        except (GossamerError, ArithmeticError) as error:
            raise GossamerError(f"{target.name}: {error}") from error
        if not_finite(weights):
            raise GossamerError(f"{target.name}: {show_method(self.solver)} gave weights that are NaN or infinite")
        return weights, packed

    def solve(self, matrix: Tensor, known: Stats, sparsity: float | None) -> tuple[Tensor, formats.Wrapped | None]:
        """Return one matrix pruned, and the product that takes its place, where there is one."""
        own = self.pattern.grain is not None  # an n of its own of every m
        pattern = self.pattern.at(sparsity) if own else self.pattern
        found = self.solver(matrix, known, pattern, None if own else sparsity)
        if not isinstance(found, Factors):
            return found[0], None
        product = _wrapped(found, pattern, matrix.dtype)
        return product.dense(), product


def select_targets(model: nn.Module, job: Job, expression: str | None, *, weightless: bool = False) -> list[Target]:
    """Return the targets, all of which the pattern fits; ``weightless`` for a model that has no weights yet."""
    chosen = targets(model, expression)
    outside = [target.name for target in chosen if target.block is None]
    if outside and (job.wants & INPUTS or job.allocation_needs & {"errors", "trials"}):
        wants = show_method(job.solver) if job.gather & INPUTS else f"allocate={show(job.allocation)}"
        raise GossamerError(
            f"{outside[0]} stands outside the blocks, where {wants} has no calibration; "
            "prune it with a data-free method such as Magnitude"
        )
    offloaded = [target.name for target in chosen if target.parameter.is_meta]
    if offloaded and not weightless:
        raise GossamerError(f"{len(offloaded)} weights are offloaded ({offloaded[0]} ...); `gossamer prune DIR` streams them")
    for target in chosen:
        job.check(target)
    if isinstance(job.solver, SolvesMLP):
        mlps(model, chosen, show_method(job.solver))
    return chosen


def check_finite(target: Target) -> None:
    """Raise if a weight holds NaN or infinities."""
    if bad := not_finite(target.parameter):
        raise GossamerError(f"{target.name}: {bad} of {target.parameter.numel()} weights are NaN or infinite")


def show_method(solver: Solver | Factorizer) -> str:
    """Write a method as users name it: a bare score for `Mask`."""
    return repr(solver.score) if isinstance(solver, solvers.Mask) else repr(solver)


def pattern_of(pattern: str | Pattern) -> Pattern:
    """Read a pattern's spec."""
    shape = parse(pattern, PATTERNS, "pattern") if isinstance(pattern, str) else pattern
    if not isinstance(shape, Pattern):
        raise GossamerError(f"{pattern!r} is no pattern, such as 2:4 or Unstructured")
    return shape


def _wrapped(factors: Factors, pattern: Pattern, dtype: torch.dtype) -> formats.Wrapped:
    core = formats.NM.pack(factors.core.to(dtype), factors.core != 0, pattern)
    return formats.Wrapped.of(factors.left.to(dtype), core, factors.right.to(dtype))


def _allocation(allocate: Any) -> Any:
    if isinstance(allocate, str):
        allocate = parse(allocate, {**names_in(scores), **ALLOCATIONS}, "allocation")  # a score inside by(Wanda, global_)
    if isinstance(allocate, Mapping):
        return allocations.mapping(allocate)
    if callable(allocate) and not isinstance(allocate, Score):
        return allocate
    raise GossamerError(f"allocate= is a name, a function or a mapping of names to sparsities, not {allocate!r}")
