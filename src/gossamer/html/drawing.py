"""What the charts of the page have in common: colours, panels, numbers as they are read, and how a figure is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly import graph_objects as go
from plotly.io import to_html

# Okabe and Ito's colours, which the colour-blind tell apart, without black and yellow: these read on white and on black.
METHODS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#8F6BB8")
NEUTRAL = ("#5F7286", "#9AA9B8", "#CBD4DD", "#7C6F64", "#B8A99A")  # for what is not a method: bytes, phases
BLUES = ["#E4EEF6", "#8DBBDC", "#2F79B5", "#0B3A66"]  # light to dark in one hue, for a quantity
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


def colours_of(names: Sequence[str]) -> dict[str, str]:
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


def short(value: float) -> str:
    """Write a number with three digits, or thousands."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """Write a fraction in per cent: ``percent(0.5) == "50 %"``."""
    return f"{100 * fraction:.4g} %"


def amount(size: float) -> str:
    """Write bytes in decimal units: ``amount(2_470_000_000) == "2.47 GB"``."""
    divisor, unit = unit_of(size)
    return f"{size / divisor:.3g} {unit}"


def unit_of(size: float) -> tuple[float, str]:
    """Return what bytes are divided by, and the unit they are then in."""
    return next(((d, u) for d, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= d), (1, "B"))


def kind(row: dict[str, Any]) -> str:
    """The weight's name within its block: ``model.layers.3.self_attn.q_proj.weight`` → ``self_attn.q_proj``."""
    inside = re.sub(rf"^.*?(?:^|\.){row['block']}\.", "", row["name"]).removesuffix(".weight")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", inside)


def lines_of(*parts: str) -> str:
    """Labels for an axis, a line for each part; plotly reads them as HTML."""
    return "<br>".join(escape(part) for part in parts)


def alternative(what: str, points: list[tuple[str, str]]) -> str:
    """Say in words what a drawing shows, for who cannot see it."""
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
