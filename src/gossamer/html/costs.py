"""What a run costs and where its zeros are: the charts of size, of time, and of each weight's sparsity."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go

from gossamer.html.drawing import (
    BLUES,
    NEUTRAL,
    Chart,
    Panel,
    alternative,
    amount,
    kind,
    lines_of,
    number,
    short,
    to_page,
    unit_of,
)

if TYPE_CHECKING:
    from gossamer.html.studies import Run


def size(runs: Sequence["Run"], prefix: str) -> Chart:
    """Bytes: what was not pruned, the values that are left, and a bit for each entry."""
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
    divisor, unit = unit_of(max(sum(row) for row in rows.values()))
    names = ("Not pruned", "Values of the pruned weights", "One bit per entry")
    series = {name: [row[i] / divisor for row in rows.values()] for i, name in enumerate(names)}
    labels = [lines_of(*label.split(" · ")) for label in rows]
    figure = _stack(labels, series, list(totals.values()), f"Size ({unit})")
    note = "Counted: non-zero values + one bit per entry, beside what was not pruned. It is not the size of a file on disk."
    panel = Panel("", alternative("Size", list(totals.items())), to_page(figure, prefix, 70 + 44 * len(labels)))
    return Chart("size", title, note, (panel,), _boxes(series))


def time(runs: Sequence["Run"], prefix: str) -> Chart:
    """Seconds, by phase."""
    title = "Time spent"
    timed = [run for run in runs if any(run.report.seconds.values())]
    if not timed:
        return Chart("time", title, "Left out: no run was timed.")
    labels = [lines_of(run.name, run.setting) for run in timed]
    spent = [{k: v for k, v in run.report.seconds.items() if k != "total"} for run in timed]
    totals = [run.report.seconds.get("total", sum(part.values())) for run, part in zip(timed, spent, strict=True)]
    for part, total in zip(spent, totals, strict=True):
        if (other := total - sum(part.values())) > 0.01 * total:
            part["other"] = other
    phases = dict.fromkeys(phase for part in spent for phase in part)
    series = {phase: [part.get(phase, 0) for part in spent] for phase in sorted(phases, key="other".__eq__)}
    figure = _stack(labels, series, [f"{short(total)} s" for total in totals], "Wall time (s)")
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


def layers(runs: Sequence["Run"], prefix: str) -> Chart:
    """Zeros of each kind of weight in each block."""
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
