"""The command that sweeps: quality over a grid of sparsities, the knee, and which weight matters."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from gossamer.cli._shared import (
    Allocate,
    Device,
    Json,
    Model,
    Quiet,
    Sampled,
    Samples,
    Seed,
    SeqLen,
    Targets,
    app,
    check_file,
    device_of,
    draw,
    fractions,
    number,
    out,
    print_comparison,
    progress_of,
    show,
    speaker,
    split,
    typed,
    write,
)  # fmt: skip


@app.command()
def sweep(
    model: Model,
    method: Annotated[str, typer.Option(metavar="SPECS", help="separated by ';'; each is a curve")] = "Magnitude",
    pattern: Annotated[str, typer.Option(metavar="SPECS", help="separated by ';'; N:8 is 7:8 to 1:8")] = "Unstructured",
    sparsity: Annotated[str, typer.Option(metavar="GRID", help="first:last:step, or a list with commas")] = "0.1:0.9:0.1",
    layers: Annotated[float | None, typer.Option(help="prune each weight alone at this sparsity too")] = None,
    by: Annotated[Literal["weight", "block"], typer.Option(help="what --layers prunes alone")] = "weight",
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="receives compare.json and index.html")] = Path("sweep"),
    data: Annotated[str, typer.Option(help="calibration text")] = "builtin",
    eval_data: Annotated[str | None, typer.Option(help="evaluation text, if it is another")] = None,
    windows: Annotated[int | None, typer.Option(help="evaluate on the first so many windows")] = None,
    seqlen: SeqLen = 512,
    samples: Samples = 32,
    sample: Sampled = "random",
    seed: Seed = 0,
    allocate: Allocate = "uniform",
    targets: Targets = None,
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Prune at every sparsity of a grid, find where quality breaks, and which weight breaks it. Goes on where it stopped."""
    from gossamer.core.pattern import check_sparsity
    from gossamer.models import resolve
    from gossamer.sites._jobs import jobs_of
    from gossamer.sweeping import expanded
    from gossamer.sweeping import sweep as run

    check_file(to_json)
    asked = split(method, ";"), split(pattern, ";"), fractions(sparsity)
    jobs_of(asked[0], expanded(asked[1]), asked[2], allocate)  # a slip in these shows before a model is fetched
    if layers is not None:
        check_sparsity(layers)
    document = run(
        resolve(model, say=speaker(quiet)),
        *asked,
        to,
        layers=layers,
        by=by,
        data=data,
        evaluation=eval_data,
        windows=windows,
        seqlen=seqlen,
        samples=samples,
        sample=sample,
        seed=seed,
        allocate=allocate,
        targets=targets,
        device=device_of(device),
        name=model,
        command=typed(),
        progress=progress_of(quiet),
        say=speaker(quiet),
    )
    draw([document], to / "index.html")
    write(to_json, document)
    print_comparison(document)
    found = Table("method", "pattern", "knee", "within 5 % of dense up to")
    for row in document["knees"]:
        found.add_row(row["method"], row["pattern"], _at(row["knee"]), _at(row["near"]))
    show(found)
    if document.get("layers"):
        worst = Table("pruned alone, worst first", "sparsity", "perplexity")
        for row in sorted(document["layers"], key=lambda row: -(row["perplexity"] or float("inf")))[:10]:
            named = row["targets"] if by == "weight" else f"block {row['block']}"
            worst.add_row(named, f"{row['sparsity']:.4f}", number(row["perplexity"]))
        show(worst)
    if not quiet:
        out.print(f"the page: {to / 'index.html'}   the numbers: {to / 'compare.json'}")


def _at(sparsity: float | None) -> str:
    return "–" if sparsity is None else f"{sparsity:.4f}"
