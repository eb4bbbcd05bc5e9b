"""A pruning job: method, pattern, sparsity and allocation, read and checked before anything is touched."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer import scores, solvers
from gossamer.core import allocate as allocations
from gossamer.core import pattern as patterns
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern, Unstructured, not_finite
from gossamer.core.score import Score
from gossamer.core.solver import Solver
from gossamer.core.spec import names_in, parse, show
from gossamer.core.stats import INPUTS, Stats
from gossamer.sites._rows import row, told
from gossamer.sites._walk import Target, targets

METHODS = {**names_in(scores), **names_in(solvers)}
PATTERNS = names_in(patterns, Pattern)
ALLOCATIONS = names_in(allocations)


@dataclass(frozen=True)
class Job:
    """What to do to each weight: the method, the pattern and the sparsity, read and checked before anything is touched."""

    solver: Solver
    pattern: Pattern
    sparsity: float | None
    allocation: Any

    @classmethod
    def of(
        cls,
        method: str | Score | Solver,
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
        if not isinstance(solver, Solver):
            raise GossamerError(f"{method!r} is no method: it wants a Score or a Solver")
        shape = pattern_of(pattern)
        if not isinstance(shape, solver.patterns):
            known = ", ".join(p.__name__ for p in solver.patterns)
            raise GossamerError(f"{show_method(solver)} is defined for the patterns {known}, not for {shape}")
        if shape == Unstructured():
            shape = Unstructured(per=solver.per)
        if getattr(shape, "permute", False) and solver.needs & {"grad", "grads"}:
            raise GossamerError(
                f"{shape} wants the inputs of the weights, and {show_method(solver)} reads gradients: leave permute out"
            )
        allocation = _allocation(allocate)
        own_total = shape.takes_sparsity and isinstance(allocation, allocations.mapping)  # a mapping's values are the total
        fraction = None if own_total and sparsity is None else shape.resolve(sparsity)
        if not shape.takes_sparsity and allocation is not allocations.uniform:
            raise GossamerError(f"the pattern {shape} leaves no sparsity to allocate; leave allocate={show(allocation)} out")
        return cls(solver, shape, fraction, allocation)

    @property
    def gather(self) -> frozenset[str]:
        """What calibration has to gather for the method itself."""
        return self.solver.needs | (frozenset({"norm"}) if getattr(self.pattern, "permute", False) else frozenset())

    @property
    def blockwise(self) -> bool:
        """Whether each block can be pruned knowing only itself and what comes before it."""
        return not self.gather & {"grad", "grads"} and not self.allocation_needs

    @property
    def allocation_needs(self) -> frozenset[str]:
        """What the allocation wants to see of every weight before the first one is pruned."""
        return getattr(self.allocation, "needs", frozenset())

    @property
    def needs_data(self) -> bool:
        """Whether calibration windows are wanted at all."""
        return bool(self.gather) or "wanda" in self.allocation_needs

    def prune(
        self, target: Target, stats: Sequence[Stats], sparsity: float | None, order: Tensor | None = None
    ) -> dict[str, Any]:
        """Prune one weight in place, its inputs taken in ``order`` (in,), and return its row of the report."""
        started = time.perf_counter()
        check_finite(target)
        matrices = target.matrices()
        if order is not None:
            matrices, stats = matrices[..., order], [known.ordered(order) for known in stats]
        for matrix, known in zip(matrices, stats, strict=True):
            try:
                weights, _ = self.solver(matrix, known, self.pattern, sparsity)
            except (GossamerError, ArithmeticError) as error:
                raise GossamerError(f"{target.name}: {error}") from error
            if not_finite(weights):
                raise GossamerError(f"{target.name}: {show_method(self.solver)} gave weights that are NaN or infinite")
            matrix.copy_(weights)
        if order is not None:
            target.matrices().copy_(matrices[..., order.argsort()])
        return {**row(target), **told(stats), "seconds": time.perf_counter() - started}


def select_targets(model: nn.Module, job: Job, expression: str | None, *, weightless: bool = False) -> list[Target]:
    """Return the targets, all of which the pattern fits; ``weightless`` for a model that has no weights yet."""
    chosen = targets(model, expression)
    outside = [target.name for target in chosen if target.block is None]
    if outside and job.gather & INPUTS:
        raise GossamerError(
            f"{outside[0]} stands outside the blocks, where {show_method(job.solver)} has no calibration; "
            "prune it with a data-free method such as Magnitude"
        )
    offloaded = [target.name for target in chosen if target.parameter.is_meta]
    if offloaded and not weightless:
        raise GossamerError(f"{len(offloaded)} weights are offloaded ({offloaded[0]} ...); `gossamer prune DIR` streams them")
    for target in chosen:
        job.pattern.check(target.matrices().shape[1:], target.name)
    return chosen


def recipe_of(
    job: Job, *, data: Any, batches: Sequence[Mapping[str, Tensor]], targets: str | None, **how: Any
) -> dict[str, Any]:
    """Return everything that decides the result, as spec strings and numbers."""
    recipe = {
        "method": show_method(job.solver),
        "pattern": str(job.pattern),
        "sparsity": job.sparsity,
        "allocate": show(job.allocation) if callable(job.allocation) else dict(job.allocation),
        "targets": targets,
    }
    if job.needs_data:
        if isinstance(data, str | Path):
            recipe |= {"data": str(data), **how}
        else:
            recipe |= {"data": "given", "samples": sum(len(next(iter(b.values()))) for b in batches)}
    return recipe


def check_finite(target: Target) -> None:
    """Raise if a weight holds NaN or infinities."""
    if bad := not_finite(target.parameter):
        raise GossamerError(f"{target.name}: {bad} of {target.parameter.numel()} weights are NaN or infinite")


def show_method(solver: Solver) -> str:
    """Write a method as users name it: a bare score for `Mask`."""
    return repr(solver.score) if isinstance(solver, solvers.Mask) else repr(solver)


def pattern_of(pattern: str | Pattern) -> Pattern:
    """Read a pattern's spec."""
    shape = parse(pattern, PATTERNS, "pattern") if isinstance(pattern, str) else pattern
    if not isinstance(shape, Pattern):
        raise GossamerError(f"{pattern!r} is no pattern, such as 2:4 or Unstructured")
    return shape


def command_of(model: str, recipe: Mapping[str, Any], out: str) -> str:
    """Return the shell command that prunes a model by this recipe."""
    words = ["gossamer", "prune", model, "--method", recipe["method"], "--pattern", recipe["pattern"]]
    if pattern_of(recipe["pattern"]).takes_sparsity and recipe["sparsity"] is not None:
        words += ["--sparsity", str(recipe["sparsity"])]
    if recipe["allocate"] != "uniform":
        words += ["--allocate", str(recipe["allocate"])]
    options = ("targets", "data", "seqlen", "samples", "sample", "seed")
    words += [word for option in options if recipe.get(option) is not None for word in (f"--{option}", str(recipe[option]))]
    return shlex.join([*words, "--out", out])


def _allocation(allocate: Any) -> Any:
    if isinstance(allocate, str):
        return parse(allocate, ALLOCATIONS, "allocation")
    if isinstance(allocate, Mapping):
        return allocations.mapping(allocate)
    if callable(allocate):
        return allocate
    raise GossamerError(f"allocate= is a name, a function or a mapping of names to sparsities, not {allocate!r}")
