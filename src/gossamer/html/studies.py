"""What the page shows of its documents: runs, put together with those that they may be compared with."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.html.drawing import percent

SETTING = ("method", "sparsity")  # what of a recipe the name of a run and its setting already say


@dataclass
class Run:
    """One report as the page shows it; every field the page needs is read here, so that a bad document fails here."""

    report: Report
    name: str
    pattern: str
    level: float  # the sparsity asked for, or reached where the pattern fixes its own
    totals: dict[str, Any]
    perplexity: float | None  # None: not evaluated, or not finite
    rest: int  # bytes of the model that were not pruned

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        report = Report.from_json({"environment": {}, **value})  # a missing one must not become this machine's
        recipe, totals = report.recipe, report.totals
        asked = recipe.get("sparsity")
        return cls(
            report,
            name=" → ".join(filter(None, [recipe.get("pruned_by"), str(recipe["method"]).removesuffix("()")])),
            # Methods compare within a row or over the tensor, each as its paper does: one group here; the recipe tells.
            pattern=re.sub(r"^Unstructured\(.*\)$", "Unstructured", str(recipe["pattern"] or "as it came")),
            level=round(totals["sparsity"], 4) if asked is None else float(asked),
            totals=totals,
            perplexity=_finite((report.evaluation or {}).get("perplexity")),
            rest=max(report.model.get("bytes", 0) - totals["bytes_dense"], 0),
        )

    @property
    def rate(self) -> float | None:
        """Tokens a second, packed where that paid."""
        speed = self.report.speed
        return speed["batch"] / speed["packed"] if speed else None

    @property
    def setting(self) -> str:
        return f"{self.pattern} · {percent(self.level)}"

    @property
    def recipe(self) -> dict[str, Any]:
        return {key: value for key, value in self.report.recipe.items() if key != "command"}

    @property
    def noted(self) -> list[dict[str, Any]]:
        return [row for row in self.report.weights if row.get("note")]


@dataclass
class Study:
    """Runs that may be compared with one another: one model, evaluated on the same tokens."""

    model: dict[str, Any]
    protocol: dict[str, Any] | None  # data, seqlen and tokens; None where nothing was evaluated
    dense: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    knees: list[dict[str, Any]] = field(default_factory=list)  # of a sweep
    layers: list[dict[str, Any]] = field(default_factory=list)  # of a sweep: what each pruned alone does

    @property
    def perplexity(self) -> float | None:
        """The dense model's."""
        return next((p for dense in self.dense if (p := _finite(dense.get("perplexity"))) is not None), None)

    def takes(self, other: "Study") -> bool:
        same = all(self.model.get(key) == other.model.get(key) for key in ("name", "class", "parameters", "dtype"))
        return same and other.protocol in (None, self.protocol)

    def add(self, other: "Study") -> None:
        self.dense.extend(dense for dense in other.dense if dense not in self.dense)
        self.runs.extend(run for run in other.runs if run not in self.runs)
        self.commands.extend(command for command in other.commands if command not in self.commands)
        self.knees.extend(knee for knee in other.knees if knee not in self.knees)
        self.layers.extend(row for row in other.layers if row not in self.layers)


def read(document: Any, place: int) -> Study:
    """Return what a document holds.

    Raises:
        GossamerError: it is not a report that can be drawn.
    """
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in READERS:
        known = ", ".join(map(repr, READERS))
        raise GossamerError(
            f"document {place} is not a gossamer report that can be drawn: its kind is {kind!r}, not one of {known}"
        )
    try:
        return READERS[kind](document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise GossamerError(f"document {place} is not a gossamer report of kind {kind!r}: {what}") from None


def _read_prune(document: dict[str, Any]) -> Study:
    run = Run.read(document)
    return Study(run.report.model, _protocol(run.report.evaluation), [], [run], _command(run.report.recipe))


def _read_recover(document: dict[str, Any]) -> Study:
    """One run of training, after a row for the model that it began with, where that was evaluated."""
    run = Run.read(document)
    report, trained = run.report, run.report.training or {}
    runs, evaluation = [run], report.evaluation
    if evaluation and trained.get("before") and report.recipe.get("pruned_by"):
        keys = ("method", "pattern", "sparsity")
        recipe = dict(zip(keys, (report.recipe[k] for k in ("pruned_by", "pattern", "sparsity")), strict=True))
        recipe["command"] = None
        was = {**document, "kind": "prune", "recipe": recipe, "seconds": {}, "peak_bytes": {}, "training": None, "speed": None}
        runs = [Run.read({**was, "evaluation": {**evaluation, "perplexity": trained["before"]}}), run]
    dense = []
    if evaluation and trained.get("dense"):
        dense = [{**evaluation, "perplexity": trained["dense"], "seconds": None, "environment": report.environment}]
        dense[0]["bytes"] = report.model["bytes"]
    return Study(report.model, _protocol(evaluation), dense, runs, _command(report.recipe))


def _read_compare(document: dict[str, Any]) -> Study:
    environment = document.get("environment", {})
    runs = [Run.read({"environment": environment, **value}) for value in document["runs"]]
    dense = [{**document["dense"], "environment": environment}] if document.get("dense") else []
    evaluation = next((e for e in (*dense, *(run.report.evaluation for run in runs)) if e), None)
    if evaluation:
        evaluation = {**evaluation, "data": document["data"]["evaluation"]}
    swept = [list(document.get(key, [])) for key in ("knees", "layers")]
    return Study(dict(document["model"]), _protocol(evaluation), dense, runs, _command(document), *swept)


READERS = {"prune": _read_prune, "shrink": _read_prune, "recover": _read_recover, "compare": _read_compare}


def _protocol(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    return {key: evaluation.get(key) for key in ("data", "seqlen", "tokens")} if evaluation else None


def _command(source: dict[str, Any]) -> list[str]:
    return [source["command"]] if source.get("command") else []


def merged(parts: list[Study]) -> list[Study]:
    """Return studies that may not be compared, the runs of each by pattern and sparsity, under names that tell them apart."""
    studies: list[Study] = []
    for part in sorted(parts, key=lambda part: part.protocol is None):  # a run not evaluated joins one that was
        home = next((study for study in studies if study.takes(part)), None)
        if home:
            home.add(part)
        else:
            studies.append(part)
    for study in studies:
        _tell_apart(study.runs)
        patterns = list(dict.fromkeys(run.pattern for run in study.runs))
        study.runs.sort(key=lambda run: (patterns.index(run.pattern), run.level))
    return studies


def _tell_apart(runs: list[Run]) -> None:
    """Where a method was run twice at one setting, add to its runs' names what differs between their recipes."""
    for method in {run.name for run in runs}:
        mine = [run for run in runs if run.name == method]
        twins = [[run for run in mine if run.setting == setting] for setting in {run.setting for run in mine}]
        keys = [k for k in mine[0].recipe if k not in SETTING and any(_differ(k, group) for group in twins)]
        seen: Counter[tuple[str, str]] = Counter()
        for run in mine:
            run.name = method + (f" ({', '.join(f'{key} {run.recipe.get(key)}' for key in keys)})" if keys else "")
            seen[run.name, run.setting] += 1
            if (again := seen[run.name, run.setting]) > 1:
                run.name += f" #{again}"


def _differ(key: str, runs: Iterable[Run]) -> bool:
    return len({json.dumps(run.recipe.get(key)) for run in runs}) > 1


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) and value > 0 else None
