"""The chart of a sweep that the others have no place for: what pruning one weight, or one block, alone does."""

from collections.abc import Sequence
from html import escape
from typing import Any

from plotly import graph_objects as go

from gossamer.html.drawing import BLUES, Chart, Panel, alternative, kind, number, percent, to_page


def sensitivity(layers: Sequence[dict[str, Any]], dense: float | None, prefix: str) -> Chart:
    """Draw the perplexity with each of ``layers`` pruned alone, as a multiple of the dense one where it is known."""
    cells: dict[tuple[str, int], float] = {}
    broken = []
    for row in layers:
        name = "block" if "," in row["targets"] else kind({"name": row["targets"], "block": row["block"]})
        if row["block"] is None or row["perplexity"] is None:
            broken.append(row["targets"])
        else:
            cells[name, row["block"]] = row["perplexity"] / (dense or 1.0)
    title = "Each pruned alone"
    note = (
        f"Perplexity{', as a multiple of the dense one,' if dense else ''} with one weight or block pruned and the rest dense"
    )
    note += f": {layers[0]['method']} {layers[0]['pattern']}, {percent(layers[0]['sparsity'])} zeros. Darker is worse."
    note += f" Not drawn: {', '.join(broken)}." if broken else ""
    if not cells:
        return Chart("sensitivity", title, note)
    kinds, blocks = list(dict.fromkeys(name for name, _ in cells)), sorted({block for _, block in cells})
    heat = go.Heatmap(
        x=blocks,
        y=[escape(name) for name in kinds],
        z=[[cells.get((name, block)) for block in blocks] for name in kinds],
        colorscale=BLUES,
        xgap=0.5,
        ygap=1,
        colorbar={"thickness": 10, "outlinewidth": 0, "nticks": 5},
        hovertemplate="block %{x}, %{y}<br>%{z:.4g}<extra></extra>",
    )
    figure = go.Figure(heat)
    figure.update_xaxes(title="Transformer block (index)", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    (name, block), highest = max(cells.items(), key=lambda cell: cell[1])
    alt = alternative("Perplexity with one pruned alone", [("highest", f"{number(highest)} for {name} in block {block}")])
    return Chart("sensitivity", title, note, (Panel("", alt, to_page(figure, f"{prefix}-sensitivity", 120 + 26 * len(kinds))),))
