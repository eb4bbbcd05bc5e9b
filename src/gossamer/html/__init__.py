"""Reports → one self-contained page, drawn from their JSON alone: the same documents give the same bytes."""

import json
import statistics
from collections import Counter
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from gossamer.core.errors import GossamerError
from gossamer.html.charts import draw
from gossamer.html.drawing import Chart, amount, colours_of, number, percent
from gossamer.html.sensitivity import sensitivity
from gossamer.html.studies import SETTING, Run, Study, merged, read

__all__ = ["page"]


def page(documents: list[dict[str, Any]], title: str | None = None) -> str:
    """Draw reports as one HTML page that opens offline.

    Args:
        documents: JSON objects of kind "prune", "shrink" or "recover" (`Report.to_json`), or "compare", in any mixture.
        title: the page's heading; None for the name of the model.

    Returns:
        The page. Runs of one model measured on the same text stand in one table; others get a section of their own.

    Raises:
        GossamerError: there is no document, or one of them is not a report.
    """
    studies = merged([read(document, place) for place, document in enumerate(documents, 1)])
    if not studies:
        raise GossamerError("there is nothing to draw: give at least one report")
    colours = colours_of([run.name for study in studies for run in study.runs])
    sections = [
        {
            "study": study,
            "verdict": _verdict(study),
            "lowest": _lowest(study),
            "timed": _dense_rate(study),
            "charts": _charts(study, colours, f"chart-{place}"),
            "recipe": _split([(f"{run.name} · {run.setting}", run.recipe) for run in study.runs], said=SETTING),
            "environment": _split(
                [("Dense", dense["environment"]) for dense in study.dense]
                + [(f"{run.name} · {run.setting}", run.report.environment) for run in study.runs]
            ),
            "notes": Counter((run.name, run.setting, row["note"]) for run in study.runs for row in run.noted),
        }
        for place, study in enumerate(studies, 1)
    ]
    environment = Environment(
        loader=PackageLoader("gossamer", "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"amount": amount, "number": number, "percent": percent}
    names = dict.fromkeys(str(study.model.get("name", "model")) for study in studies)
    heading = ", ".join(names) if title is None else title
    return environment.get_template("page.html.j2").render(heading=heading, sections=sections, plotly=get_plotlyjs())


def _best(study: Study) -> list[Run]:
    """The evaluated run of lowest perplexity at each setting, in the order of the settings."""
    evaluated = [run for run in study.runs if run.perplexity is not None]
    return [min(group, key=lambda run: run.perplexity or 0.0) for _, group in groupby(evaluated, lambda run: run.setting)]


def _dense_rate(study: Study) -> float | None:
    """The dense model's tokens a second, the median over the runs that measured it beside themselves; None where none did."""
    rates = [speed["batch"] / speed["dense"] for run in study.runs if (speed := run.report.speed)]
    return statistics.median(rates) if rates else None


def _charts(study: Study, colours: dict[str, str], prefix: str) -> list[Chart]:
    """All drawings, that of a sweep's single weights after that of quality."""
    drawn = draw(study.runs, study.perplexity, colours, prefix)
    return [drawn[0], *([sensitivity(study.layers, study.perplexity, prefix)] if study.layers else []), *drawn[1:]]


def _lowest(study: Study) -> list[Run]:
    """Those of the best runs that have a rival."""
    rivals = Counter(run.setting for run in study.runs if run.perplexity is not None)
    return [run for run in _best(study) if rivals[run.setting] > 1]


def _verdict(study: Study) -> str:
    """One sentence: who has the lowest perplexity where, against dense. Neighbouring sparsities of one winner are one item."""
    best, dense = _best(study), study.perplexity
    if not best:
        return "Nothing here was evaluated, so the page shows what was pruned and what it cost, not what it did to quality."
    items = []
    for (name, pattern), group in groupby(best, lambda run: (run.name, run.pattern)):
        wins = list(group)
        ends = wins if len(wins) == 1 else [wins[0], wins[-1]]
        levels = " to ".join(percent(run.level) for run in ends)
        values = " to ".join(number(run.perplexity) for run in ends)
        times = " to ".join(f"{number(run.perplexity / dense)}×" for run in ends if run.perplexity) if dense else ""
        items.append(f"{name} with {values}" + (f" ({times} dense)" if times else "") + f" at {pattern} {levels}")
    reference = f" (dense: {number(dense)})" if dense else ""
    turns = [f"{k['method']} at {k['pattern']} {percent(k['knee'])}" for k in study.knees if k["knee"] is not None]
    knees = f" Beyond these sparsities perplexity rises much faster: {'; '.join(turns)}." if turns else ""
    return f"{'Lowest perplexity' if _lowest(study) else 'Perplexity'}{reference}: {'; '.join(items)}.{knees}"


def _split(rows: list[tuple[str, dict[str, Any]]], said: tuple[str, ...] = ()) -> dict[str, Any]:
    """Part what all rows agree on from what they differ in, leaving out of the latter what their names have ``said``."""
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    varying = [key for key in keys if len({json.dumps(row.get(key)) for _, row in rows}) > 1]
    common = {key: rows[0][1].get(key) for key in keys if key not in varying}
    differing = [key for key in varying if key not in said]
    return {"common": common, "keys": differing, "rows": rows if differing else []}
