"""The charts of the page: each is a pure function of runs, and says in a sentence why it is left out where it is."""

import math
import re
import statistics
from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go

from gossamer.html.costs import layers, size, time
from gossamer.html.drawing import NEUTRAL, Chart, Panel, alternative, lines_of, number, percent, short, to_page

if TYPE_CHECKING:
    from gossamer.html.studies import Run

STYLES = (("solid", "circle", "●"), ("dot", "diamond", "◆"), ("dashdot", "triangle-up", "▲"))  # of a pattern's lines and points


def draw(runs: Sequence["Run"], dense: float | None, colours: dict[str, str], prefix: str) -> list[Chart]:
    """Draw every chart of a set of runs; ``prefix`` begins the ids of their elements."""
    return [
        _quality(runs, dense, colours, f"{prefix}-quality"),
        *([_trade(runs, dense, colours, f"{prefix}-trade")] if any(run.report.speed for run in runs) else []),
        *([_loss(runs, colours, f"{prefix}-loss")] if any(map(_losses, runs)) else []),
        size(runs, f"{prefix}-size"),
        time(runs, f"{prefix}-time"),
        layers(runs, f"{prefix}-layers"),
    ]


def _quality(runs: Sequence["Run"], dense: float | None, colours: dict[str, str], prefix: str) -> Chart:
    title = "Quality against sparsity"
    drawn = [run for run in runs if run.perplexity is not None]
    if not drawn:
        return Chart("quality", title, "Left out: no run has a perplexity to draw.")
    values = [run.perplexity for run in drawn if run.perplexity is not None] + ([dense] if dense else [])
    low, high = min(values), max(values)
    log = high > 10 * low
    patterns = list(dict.fromkeys(run.pattern for run in drawn))
    swept = any(len({run.level for run in drawn if run.pattern == pattern}) > 1 for pattern in patterns)
    curves = list(dict.fromkeys(_curve(pattern) for pattern in patterns))
    figure = go.Figure()
    key = []
    for name in dict.fromkeys(run.name for run in drawn):
        mine = [run for run in drawn if run.name == name]
        if not swept:
            figure.add_trace(_bars(mine, colours[name]))
            key.append((name, colours[name], "■"))
            continue
        for curve, style in zip(curves, cycle(STYLES), strict=False):
            if points := sorted((run for run in mine if _curve(run.pattern) == curve), key=lambda run: run.level):
                figure.add_trace(_line(points, colours[name], style))
                key.append(
                    (
                        f"{name} · {curve if len(points) > 1 else points[0].pattern}" if len(curves) > 1 else name,
                        colours[name],
                        style[2],
                    )
                )
    if dense:
        line = {"dash": "dash", "color": NEUTRAL[1], "width": 2}
        figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=dense, y1=dense, line=line)
        key.append((f"Dense {number(dense)}", NEUTRAL[1], "╍╍"))
    scale: dict[str, Any] = {} if swept else {"range": [0, high * 1.12]}
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**e for e in decades[:: len(decades) // 8 + 1] for m in ((1, 2, 5) if high < 1000 * low else (1,))]
        scale = {"type": "log", "range": [math.log10(low * 0.7), math.log10(high * 1.6)]}
        scale |= {"tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}
    figure.update_yaxes(title="Perplexity (lower is better" + (", log scale)" if log else ")"), **scale)
    figure.update_xaxes(title="Sparsity (% zeros)" if swept else "Pattern and sparsity (% zeros)", showgrid=swept)
    if not swept:
        settings = dict.fromkeys(lines_of(run.pattern, percent(run.level)) for run in drawn)
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(settings))
    missing = [f"{run.name} at {run.setting}" for run in runs if run.report.evaluation and run.perplexity is None]
    note = "Perplexity of the pruned model by method; the dashed line is the dense model." if dense else "No dense reference."
    note += f" Not drawn, as the perplexity is not finite: {', '.join(missing)}." if missing else ""
    alt = alternative("Perplexity", [(f"{run.name} at {run.setting}", number(run.perplexity)) for run in drawn])
    return Chart("quality", title, note, (Panel("", alt, to_page(figure, prefix, 380)),), tuple(key))


def _curve(pattern: str) -> str:
    """What stands on one line of a sweep: all n:m of one m do."""
    return re.sub(r"^\d+:(\d+)$", r"n:\1", pattern)


def _trade(runs: Sequence["Run"], dense: float | None, colours: dict[str, str], prefix: str) -> Chart:
    """Quality against measured speed: what a user decides from. Up is worse, right is faster; dense is the cross."""
    title = "Quality against speed"
    drawn = [run for run in runs if run.perplexity is not None and run.report.speed]
    if not drawn:
        return Chart("trade", title, "Left out: no run has both a perplexity and a measured speed.")
    figure = go.Figure()
    key = []
    patterns = list(dict.fromkeys(run.pattern for run in drawn))
    for name in dict.fromkeys(run.name for run in drawn):
        for pattern, style in zip(patterns, cycle(STYLES), strict=False):
            if points := [run for run in drawn if (run.name, run.pattern) == (name, pattern)]:
                figure.add_trace(
                    go.Scatter(
                        name=escape(f"{name} · {pattern}"),
                        x=[run.rate for run in points],
                        y=[run.perplexity for run in points],
                        mode="markers",
                        marker={"size": 13, "symbol": style[1], "color": colours[name]},
                        customdata=[[percent(run.level), (run.report.speed or {})["ratio"]] for run in points],
                        hovertemplate="%{x:.4g} tokens/s (%{customdata[1]:.2f}×)<br>"
                        "perplexity %{y:,.4g}, %{customdata[0]} zeros",
                    )
                )
                key.append((f"{name} · {pattern}" if len(patterns) > 1 else name, colours[name], style[2]))
    reference = [speed["batch"] / speed["dense"] for run in drawn if (speed := run.report.speed)]
    values = [run.perplexity or 0.0 for run in drawn]
    if dense:
        middle = statistics.median(reference)
        cross = {"size": 13, "symbol": "x", "color": NEUTRAL[0]}
        figure.add_trace(go.Scatter(name="Dense", x=[middle], y=[dense], mode="markers", marker=cross, hovertemplate="dense"))
        figure.add_vline(x=middle, line={"dash": "dash", "color": NEUTRAL[1], "width": 2})
        key.append((f"Dense {number(dense)}, {short(middle)} tokens/s", NEUTRAL[0], "✕"))
        values.append(dense)
    log = max(values) > 10 * min(values)
    figure.update_yaxes(title="Perplexity (lower is better" + (", log scale)" if log else ")"), type="log" if log else "linear")
    if log:
        figure.update_yaxes(dtick=1)
    figure.update_xaxes(title="Decoding speed (tokens/s, measured)")
    first = drawn[0].report.speed or {}
    note = (
        f"Decoding with a static cache, batch {first['batch']}, {first['context']} tokens of context, each run beside the "
        "dense model. Left of the dashed line sparse is slower than dense."
    )
    told = [(f"{run.name} at {run.setting}", f"{number(run.perplexity)} at {short(run.rate or 0)} tokens/s") for run in drawn]
    return Chart(
        "trade", title, note, (Panel("", alternative("Perplexity and speed", told), to_page(figure, prefix, 380)),), tuple(key)
    )


def _loss(runs: Sequence["Run"], colours: dict[str, str], prefix: str) -> Chart:
    """The loss of each step of training; a run's line is broken where it was not finite."""
    trained = [(run, losses) for run in runs if (losses := _losses(run))]
    figure, key, points = go.Figure(), [], []
    settings = list(dict.fromkeys(run.setting for run, _ in trained))
    for run, losses in trained:
        dash, _, _ = STYLES[settings.index(run.setting) % len(STYLES)]
        look = {"color": colours[run.name], "dash": dash, "width": 2}
        steps = list(range(1, len(losses) + 1))
        figure.add_trace(
            go.Scatter(
                name=escape(run.name), x=steps, y=losses, mode="lines", line=look, hovertemplate="step %{x}<br>loss %{y:.4g}"
            )
        )
        label = f"{run.name} · {run.setting}" if len(settings) > 1 else run.name
        key.append((label, colours[run.name], "━"))
        finite = [loss for loss in losses if loss is not None]
        points += [(f"{label}, first", number(finite[0])), (f"{label}, last", number(finite[-1]))] if finite else []
    figure.update_xaxes(title="Optimizer step", rangemode="tozero")
    figure.update_yaxes(title="Loss", rangemode="tozero")
    note = "The loss that was trained on; terms and weights are in the recipe, so only runs of one loss compare."
    return Chart(
        "loss", "Loss in training", note, (Panel("", alternative("Loss", points), to_page(figure, prefix, 300)),), tuple(key)
    )


def _losses(run: "Run") -> list[float | None]:
    return (run.report.training or {}).get("losses") or []


def _bars(runs: Sequence["Run"], colour: str) -> go.Bar:
    labels = [lines_of(run.pattern, percent(run.level)) for run in runs]
    heights = [run.perplexity or 0.0 for run in runs]
    look = {
        "marker": {"color": colour},
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "perplexity %{y:,.4g}",
    }
    return go.Bar(name=escape(runs[0].name), x=labels, y=heights, text=[short(height) for height in heights], **look)


def _line(runs: Sequence["Run"], colour: str, style: tuple[str, str, str]) -> go.Scatter:
    return go.Scatter(
        name=escape(f"{runs[0].name} · {runs[0].pattern}"),
        x=[100 * run.totals["sparsity"] for run in runs],
        y=[run.perplexity for run in runs],
        mode="lines+markers",
        line={"color": colour, "dash": style[0], "width": 2.5},
        marker={"size": 9, "symbol": style[1]},
        hovertemplate="%{x:.4g} % zeros<br>perplexity %{y:,.4g}",
    )
