"""The charts of the page: each is a pure function of runs, and says in a sentence why it is left out where it is."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go
from plotly.io import to_html

if TYPE_CHECKING:
    from gossamer.html import Run

# Okabe and Ito's colours, which the colour-blind tell apart, without black and yellow: these read on white and on black.
METHODS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#8F6BB8")
NEUTRAL = ("#5F7286", "#9AA9B8", "#CBD4DD", "#7C6F64", "#B8A99A")  # for what is not a method: bytes, phases
BLUES = ["#E4EEF6", "#8DBBDC", "#2F79B5", "#0B3A66"]  # light to dark in one hue, for a quantity
STYLES = (("solid", "circle", "●"), ("dot", "diamond", "◆"), ("dashdot", "triangle-up", "▲"))  # of a pattern's lines and points
MUTED, GRID = "#5B6672", "rgba(128,140,152,0.28)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Panel:
    """One drawing: its heading, what it shows in words, and its HTML."""

    heading: str
    alt: str
    html: str


@dataclass(frozen=True)
class Chart:
    """A titled group of drawings; where there are none, the note says why."""

    name: str
    title: str
    note: str
    panels: tuple[Panel, ...] = ()
    key: tuple[tuple[str, str, str], ...] = ()  # (label, colour, glyph); in HTML, as it wraps


def draw(runs: Sequence["Run"], dense: float | None, colours: dict[str, str], prefix: str) -> list[Chart]:
    """Draw every chart of a set of runs; ``prefix`` begins the ids of their elements."""
    return [
        _quality(runs, dense, colours, f"{prefix}-quality"),
        *([_trade(runs, dense, colours, f"{prefix}-trade")] if any(run.report.speed for run in runs) else []),
        *([_loss(runs, colours, f"{prefix}-loss")] if any(map(_losses, runs)) else []),
        _size(runs, f"{prefix}-size"),
        _time(runs, f"{prefix}-time"),
        _layers(runs, f"{prefix}-layers"),
    ]


def colours(names: Sequence[str]) -> dict[str, str]:
    """Give each name its colour, in the order of first appearance."""
    return {name: METHODS[i % len(METHODS)] for i, name in enumerate(dict.fromkeys(names))}


def number(value: float | None) -> str:
    """Write a number for reading: two decimals, or thousands and none.

    >>> number(14.2039), number(12345.6), number(None)
    ('14.20', '12,346', '–')
    """
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """Write a fraction in per cent: ``percent(0.5) == "50 %"``."""
    return f"{100 * fraction:.4g} %"


def amount(size: float) -> str:
    """Write bytes in decimal units: ``amount(2_470_000_000) == "2.47 GB"``."""
    divisor, unit = _unit(size)
    return f"{size / divisor:.3g} {unit}"


def _unit(size: float) -> tuple[float, str]:
    return next(((d, u) for d, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= d), (1, "B"))


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
        settings = dict.fromkeys(_lines(run.pattern, percent(run.level)) for run in drawn)
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
        key.append((f"Dense {number(dense)}, {_short(middle)} tokens/s", NEUTRAL[0], "✕"))
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
    told = [(f"{run.name} at {run.setting}", f"{number(run.perplexity)} at {_short(run.rate or 0)} tokens/s") for run in drawn]
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
    labels = [_lines(run.pattern, percent(run.level)) for run in runs]
    heights = [run.perplexity or 0.0 for run in runs]
    look = {
        "marker": {"color": colour},
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "perplexity %{y:,.4g}",
    }
    return go.Bar(name=escape(runs[0].name), x=labels, y=heights, text=[_short(height) for height in heights], **look)


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


def _size(runs: Sequence["Run"], prefix: str) -> Chart:
    title = "Size"
    # methods of one setting keep the same count or nearly so: the largest stands for them
    by_size = sorted((run for run in runs if run.totals["entries"]), key=lambda run: run.totals["bytes_bitmask"])
    last = {run.setting: run for run in by_size}
    largest = {run.setting: last[run.setting] for run in runs if run.setting in last}
    if not largest:
        return Chart("size", title, "Left out: there is no pruned weight.")
    first = next(iter(largest.values()))
    rows = {"Dense": (first.rest, first.totals["bytes_dense"], 0)}
    for setting, run in largest.items():
        bits = math.ceil(run.totals["entries"] / 8)
        rows[setting] = (run.rest, run.totals["bytes_bitmask"] - bits, bits)
    totals = {label: amount(sum(row)) for label, row in rows.items()}
    divisor, unit = _unit(max(sum(row) for row in rows.values()))
    names = ("Not pruned", "Values of the pruned weights", "One bit per entry")
    series = {name: [row[i] / divisor for row in rows.values()] for i, name in enumerate(names)}
    labels = [_lines(*label.split(" · ")) for label in rows]
    figure = _stack(labels, series, list(totals.values()), f"Size ({unit})")
    note = "Counted: non-zero values + one bit per entry, beside what was not pruned. It is not the size of a file on disk."
    panel = Panel("", alternative("Size", list(totals.items())), to_page(figure, prefix, 70 + 44 * len(labels)))
    return Chart("size", title, note, (panel,), _boxes(series))


def _time(runs: Sequence["Run"], prefix: str) -> Chart:
    title = "Time spent"
    timed = [run for run in runs if any(run.report.seconds.values())]
    if not timed:
        return Chart("time", title, "Left out: no run was timed.")
    labels = [_lines(run.name, run.setting) for run in timed]
    spent = [{k: v for k, v in run.report.seconds.items() if k != "total"} for run in timed]
    totals = [run.report.seconds.get("total", sum(part.values())) for run, part in zip(timed, spent, strict=True)]
    for part, total in zip(spent, totals, strict=True):
        if (other := total - sum(part.values())) > 0.01 * total:
            part["other"] = other
    phases = dict.fromkeys(phase for part in spent for phase in part)
    series = {phase: [part.get(phase, 0) for part in spent] for phase in sorted(phases, key="other".__eq__)}
    figure = _stack(labels, series, [f"{_short(total)} s" for total in totals], "Wall time (s)")
    alt = alternative("Seconds", [(f"{run.name} at {run.setting}", number(t)) for run, t in zip(timed, totals, strict=True)])
    panel = Panel("", alt, to_page(figure, prefix, 70 + 44 * len(labels)))
    return Chart("time", title, "Wall time of each run by phase.", (panel,), _boxes(series))


def _boxes(series: dict[str, list[float]]) -> tuple[tuple[str, str, str], ...]:
    return tuple((name, NEUTRAL[i % len(NEUTRAL)], "■") for i, name in enumerate(series))


def _stack(labels: list[str], series: dict[str, list[float]], totals: list[str], axis: str) -> go.Figure:
    """Horizontal bars, a row for each label, with the total written at the end."""
    ends = [sum(column) for column in zip(*series.values(), strict=True)]
    figure = go.Figure()
    for (name, colour, _), values in zip(_boxes(series), series.values(), strict=True):
        bar = {"name": escape(name), "marker": {"color": colour}, "hovertemplate": "%{x:,.4g}"}
        figure.add_trace(go.Bar(y=list(range(len(labels))), x=values, orientation="h", width=0.62, **bar))
    end = {"mode": "text", "textposition": "middle right", "hoverinfo": "skip", "cliponaxis": False}
    figure.add_trace(go.Scatter(y=list(range(len(labels))), x=ends, text=[f" {total}" for total in totals], **end))
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title=axis, range=[0, 1.34 * max(ends)], nticks=5)
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, range=[len(labels) - 0.5, -0.5], showgrid=False)
    return figure


def _layers(runs: Sequence["Run"], prefix: str) -> Chart:
    title = "Sparsity of each weight"
    grids: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if grid := _grid(run):
            grids.setdefault(tuple(sorted(grid.items())), []).append(run)
    if not grids:
        return Chart("layers", title, "Left out: no pruned weight belongs to a numbered block.")
    values = [value for grid in grids for _, value in grid]
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max(high - low, 5) / 2
    panels = []
    for i, (cells, alike) in enumerate(grids.items(), 1):
        grid = dict(cells)
        kinds = list(dict.fromkeys(kind(w) for w in alike[0].report.weights if w.get("block") is not None))
        blocks = sorted({block for _, block in grid})
        heat = go.Heatmap(
            x=blocks,
            y=[escape(name) for name in kinds],
            z=[[grid.get((name, block)) for block in blocks] for name in kinds],
            zmin=middle - half,
            zmax=middle + half,
            colorscale=BLUES,
            xgap=0.5,
            ygap=1,
            colorbar={"thickness": 10, "outlinewidth": 0, "ticksuffix": " %", "nticks": 5},
            hovertemplate="block %{x}, %{y}<br>%{z:.4g} % zeros<extra></extra>",
        )
        figure = go.Figure(heat)
        figure.update_xaxes(title="Transformer block (index)", showgrid=False)
        figure.update_yaxes(autorange="reversed", showgrid=False)
        settings = dict.fromkeys(run.setting for run in alike)
        heading = "; ".join(f"{s}: {', '.join(run.name for run in alike if run.setting == s)}" for s in settings)
        spread = f"from {min(grid.values()):.4g} % to {max(grid.values()):.4g} %"
        alt = f"Sparsity of each weight by block, {heading}: {len(kinds)} kinds in {len(blocks)} blocks, {spread}."
        panels.append(Panel(heading, alt, to_page(figure, f"{prefix}-{i}", 120 + 26 * len(kinds))))
    flat = all(len({value for _, value in grid}) == 1 for grid in grids)
    note = "Every weight of a run has the same sparsity." if flat else "Runs whose weights agree share a drawing."
    return Chart("layers", title, note, tuple(panels))


def _grid(run: "Run") -> dict[tuple[str, int], float]:
    """The per cent of zeros of each kind of weight in each block, counted over all weights of that kind (experts)."""
    counts: dict[tuple[str, int], list[int]] = {}
    for row in run.report.weights:
        if row.get("block") is not None:
            cell = counts.setdefault((kind(row), row["block"]), [0, 0])
            cell[0] += row["nnz"]
            cell[1] += math.prod(row["shape"])
    return {key: round(100 * (1 - nnz / size), 2) for key, (nnz, size) in counts.items() if size}


def kind(row: dict[str, Any]) -> str:
    """The weight's name within its block: ``model.layers.3.self_attn.q_proj.weight`` → ``self_attn.q_proj``."""
    inside = re.sub(rf"^.*?(?:^|\.){row['block']}\.", "", row["name"]).removesuffix(".weight")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)


def _lines(*parts: str) -> str:
    """Labels for an axis, a line for each part; plotly reads them as HTML."""
    return "<br>".join(escape(part) for part in parts)


def alternative(what: str, points: list[tuple[str, str]]) -> str:
    return f"{what}: " + "; ".join(f"{label} {value}" for label, value in points) + "."


def to_page(figure: go.Figure, element: str, height: int) -> str:
    """Lay out and write one figure. Colours of text come from the page's style sheet in the dark."""
    figure.update_layout(
        template="none",
        autosize=True,
        margin={"l": 40, "r": 12, "t": 12, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": MUTED},
        showlegend=False,
        hoverlabel={"font": {"family": FONT}},
        dragmode=False,
    )
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "ticks": "",
        "ticklabelstandoff": 5,
        "fixedrange": True,
        "title_standoff": 10,
        "automargin": True,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    config = {"displayModeBar": False, "responsive": True}
    return str(
        to_html(figure, config=config, include_plotlyjs=False, full_html=False, div_id=element, default_height=f"{height}px")
    )
