"""The catalogue: everything that a spec may name, by kind, read off the code itself."""

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from gossamer import formats, scores, sites, solvers, structures
from gossamer.core import schedule as schedules
from gossamer.core.pattern import Pattern
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Solver
from gossamer.core.spec import names_in
from gossamer.core.tuner import Tuner
from gossamer.sites._job import ALLOCATIONS, PATTERNS
from gossamer.tuning import TUNERS


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Return everything a spec may name, by kind: each with its signature, what it needs, for which patterns it is, and its
    docstring's first line; a method of any pattern says "any", and what takes no pattern nothing."""
    kinds = {
        "scores": names_in(scores),
        "solvers": names_in(solvers),
        "structures": names_in(structures),
        "tuners": TUNERS,
        "patterns": PATTERNS,
        "allocations": ALLOCATIONS,
        "schedules": names_in(schedules),
        "formats": names_in(formats),
        "sites": {
            name: import_module(f"gossamer.sites.{name}") for _, name, _ in iter_modules(sites.__path__) if name[0] != "_"
        },
    }
    return {kind: [_entry(name, thing) for name, thing in sorted(things.items())] for kind, things in kinds.items()}


def _entry(name: str, thing: Any) -> dict[str, Any]:
    needs: Any = getattr(thing, "needs", frozenset())
    plain = inspect.ismodule(thing) or thing in vars(formats).values()  # never written out in a spec
    fields = [] if plain else inspect.signature(thing).parameters.values()
    free = [f for f in fields if f.name not in ("tensors", "sparsity")]
    return {
        "name": name,
        "signature": f"{name}({', '.join(str(f.replace(annotation=f.empty)) for f in free)})" if free else name,
        "needs": sorted(needs) if isinstance(needs, frozenset) else [inspect.getdoc(needs)],
        "patterns": _patterns(thing),
        "summary": (thing.__doc__ or "").strip().splitlines()[0],
    }


def _patterns(thing: Any) -> list[str]:
    """Return the names of the patterns that a method is defined for."""
    if not inspect.isclass(thing) or not issubclass(thing, Score | Solver | Factorizer | Tuner):
        return []
    if issubclass(thing, Tuner) and not thing.chooses:  # it keeps the zeros that are there
        return []
    found: Any = getattr(thing, "patterns", (Pattern,))
    if isinstance(found, property):
        return [inspect.getdoc(found) or ""]
    return ["any"] if Pattern in found else [kind.__name__ for kind in found]
