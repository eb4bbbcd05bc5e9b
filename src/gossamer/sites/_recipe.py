"""A pruning job in words: what a report keeps of it, and the command that runs it again."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.core.spec import show
from gossamer.sites._job import Job, pattern_of, show_method


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
