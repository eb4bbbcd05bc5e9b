"""Ranking: the runs of a comparison, those of several seeds together, the best first."""

import math
import statistics
from collections.abc import Mapping
from typing import Any


def ranked(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method at each pattern and sparsity, the lowest perplexity first.

    Patterns and sparsities come in the order of the runs. Over several seeds, perplexity is their mean and ``spread`` the
    difference between the highest and the lowest; seconds are the median, peak_bytes the highest. A perplexity that is not
    finite goes last.

    Args:
        document: a comparison, as `gossamer.compare.compare` returns it.

    Returns:
        rows of place (1 is best), method, pattern, allocate, asked and sparsity, perplexity, spread, seeds, seconds,
        peak_bytes, tasks (each task's mean accuracy over the runs that answered it), speed (of the run that was timed),
        evaluated, bytes_dense and bytes_bitmask.

    >>> run = {"recipe": {"method": "Wanda", "pattern": "2:4"}, "totals": {"sparsity": 0.5}, "seconds": {"total": 1.0}}
    >>> [row] = ranked({"runs": [run | {"evaluation": {"perplexity": p}} for p in (30.0, 32.0)]})
    >>> row["perplexity"], row["spread"], row["seeds"]
    (31.0, 2.0, 2)
    """
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows_of(document):
        found.setdefault((_kind(row["pattern"]), row["asked"]), []).append(row)
    best = [sorted(rows, key=_quality) for rows in found.values()]
    return [{"place": place, **row} for rows in best for place, row in enumerate(rows, 1)]


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return `ranked`'s rows without their places, in the order of the runs."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for run in document["runs"]:
        recipe = run["recipe"]
        method = " → ".join(filter(None, [recipe.get("pruned_by"), recipe["method"]]))
        key = method, recipe["pattern"], str(recipe.get("allocate")), recipe.get("sparsity")
        found.setdefault(key, []).append(run)
    return [_row(key, runs) for key, runs in found.items()]


def _quality(row: Mapping[str, Any]) -> float:
    return math.inf if row["perplexity"] is None else float(row["perplexity"])


def _kind(pattern: str | None) -> str | None:
    """Name what competes with what: ``Unstructured`` whichever entries are compared, and any other pattern as it is."""
    return "Unstructured" if pattern and pattern.startswith("Unstructured") else pattern


def _row(key: tuple[Any, ...], runs: list[Any]) -> dict[str, Any]:
    found = [(run["evaluation"] or {}).get("perplexity") for run in runs]
    finite = [p for p in found if p is not None]
    whole = len(finite) == len(found)
    return {
        **dict(zip(("method", "pattern", "allocate", "asked"), key, strict=True)),
        "sparsity": statistics.fmean(run["totals"]["sparsity"] for run in runs),
        "perplexity": statistics.fmean(finite) if whole else None,
        "spread": max(finite) - min(finite) if whole and len(finite) > 1 else None,
        "seeds": len(runs),
        "seconds": statistics.median(run["seconds"]["total"] for run in runs),
        "peak_bytes": max((max(run.get("peak_bytes", {}).values(), default=0) for run in runs), default=0),
        "tasks": _tasks(runs),
        "speed": next((run["speed"] for run in runs if run.get("speed")), None),
        "evaluated": any(run["evaluation"] for run in runs),
        **{key: runs[0]["totals"].get(key) for key in ("bytes_dense", "bytes_bitmask")},
    }


def _tasks(runs: list[Any]) -> dict[str, float]:
    """Average each task's accuracy over the runs that answered tasks."""
    given = [answers for run in runs if (answers := (run["evaluation"] or {}).get("tasks"))]
    names = [name for name in given[0] if all("acc" in one.get(name, {}) for one in given)] if given else []
    return {name: statistics.fmean(one[name]["acc"] for one in given) for name in names}
