"""Sweep: methods over a grid of sparsities, where quality breaks, and which weight breaks it: a comparison with more fields."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gossamer.compare import compare
from gossamer.core.atomic import write_text
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import check_sparsity
from gossamer.models import check_directory, skeleton
from gossamer.sites._job import Job, pattern_of
from gossamer.sites._walk import targets as find_targets

NEAR = 1.05  # a perplexity of so many times the dense one still counts as near it


def sweep(
    source: Path,
    methods: Sequence[str],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    folder: Path,
    *,
    layers: float | None = None,
    by: Literal["weight", "block"] = "weight",
    targets: str | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Prune and evaluate at every sparsity, find the knee of each curve, and prune single weights or blocks.

    Finished runs are kept in ``folder``, so that the same call, or one with a finer grid, goes on where it stopped.

    Args:
        source: a model directory.
        methods: their specs; one curve each.
        patterns: specs; "N:8" stands for 7:8, 6:8 ... 1:8, one curve.
        sparsities: the grid, for the patterns that take one.
        folder: receives compare.json and runs/.
        layers: prune each target alone at this sparsity too, by the first method and pattern.
        by: what is pruned alone: each weight, or all of a block.
        targets: which weights, by name or glob.
        how: as in `gossamer.compare.compare`.

    Returns:
        The comparison as one JSON object, with "knees" (see `knee`), and with "layers" where these were asked for: targets,
        block, method, pattern, sparsity and perplexity of each.

    Raises:
        GossamerError: anything asked for that cannot be, before anything is done.
    """
    check_directory(source)
    specs = expanded(patterns)
    alone: list[tuple[Job, str]] = []
    if layers is not None:
        if not methods or not specs:
            raise GossamerError("sweep wants at least one method and one pattern, several separated by ';'")
        share = check_sparsity(layers) if pattern_of(specs[0]).takes_sparsity else None
        job = Job.of(methods[0], specs[0], share)
        chosen = find_targets(skeleton(source), targets)
        groups: dict[Any, list[str]] = {}
        for target in chosen:
            groups.setdefault(target.block if by == "block" else target.name, []).append(target.name)
        alone = [(job, ",".join(names)) for names in groups.values()]
    document = compare(source, methods, specs, sparsities, folder, targets=targets, alone=alone, **how)
    document["knees"] = knees(document)
    write_text(folder / "compare.json", json.dumps(document, indent=1) + "\n")
    return document


def expanded(patterns: Sequence[str]) -> list[str]:
    """Write out N:m as all n:m, densest first.

    >>> expanded(["Unstructured", "N:4"])
    ['Unstructured', '3:4', '2:4', '1:4']
    """
    found: list[str] = []
    for pattern in patterns:
        every = re.fullmatch(r"N:(\d+)", pattern.strip())
        found += [f"{n}:{every[1]}" for n in range(int(every[1]) - 1, 0, -1)] if every else [pattern]
    return found


def knee(curve: Sequence[tuple[float, float | None]]) -> float | None:
    """Return the essential sparsity: where perplexity begins to rise much faster (Jaiswal et al., 2023, arXiv:2306.03805).

    The paper defines a sharp turning point and reads it off by eye. Here it is the point (s, ln perplexity) that lies farthest
    below the straight line from the first point to the last, vertically; of equal ones the first. None where no point lies
    below it (the curve does not turn), or fewer than three perplexities are finite. Points that are not finite are left out.

    Args:
        curve: (sparsity, perplexity), the dense model's (0, perplexity) among them.

    >>> knee([(0.0, 10.0), (0.2, 10.1), (0.4, 10.5), (0.6, 20.0), (0.8, 400.0)])
    0.6
    >>> knee([(0.0, 1.0), (0.4, 4.0), (0.8, 16.0)])  # the logarithm rises evenly
    """
    points = sorted((s, math.log(p)) for s, p in curve if p is not None and math.isfinite(p) and p > 0)
    if len(points) < 3 or points[-1][0] == points[0][0]:
        return None
    (first, low), (last, high) = points[0], points[-1]
    below = [low + (high - low) * (s - first) / (last - first) - y for s, y in points]
    deepest = max(below)
    return points[below.index(deepest)][0] if deepest > 1e-9 else None


def knees(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for each method and pattern of a comparison, its knee, and the highest sparsity that is still near dense.

    All n:m of one m are one curve. ``near`` is the highest sparsity up to which every point is within 5 % of the dense
    perplexity; None where the first is not.
    """
    dense = (document.get("dense") or {}).get("perplexity")
    curves: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for run in document["runs"]:
        pattern = re.sub(r"^\d+:(\d+)$", r"N:\1", run["recipe"]["pattern"])
        point = (run["totals"]["sparsity"], (run["evaluation"] or {}).get("perplexity"))
        curves.setdefault((run["recipe"]["method"], pattern), []).append(point)
    found = []
    for (method, pattern), curve in curves.items():
        near = None
        for s, p in sorted(curve, key=lambda point: point[0]):
            if dense is None or p is None or p > NEAR * dense:
                break
            near = s
        found.append({"method": method, "pattern": pattern, "knee": knee([(0.0, dense), *curve]), "near": near})
    return found
