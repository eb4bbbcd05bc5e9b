"""The commands that train: recover, and run, which takes a model through a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli._shared import (
    Device,
    Force,
    Model,
    Quiet,
    SeqLen,
    Targets,
    app,
    device_of,
    draw,
    number,
    out,
    print_comparison,
    progress_of,
    speaker,
    typed,
    write,
)  # fmt: skip
from gossamer.core.errors import GossamerError


@app.command()
def recover(
    model: Model,
    data: Annotated[str, typer.Option(help="text to train on: a file, a folder, builtin, a data set")],
    steps: Annotated[int, typer.Option(help="optimizer steps")],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="the trained model's directory")],
    method: Annotated[str, typer.Option(metavar="SPEC", help="how: see gossamer ls tuners")] = "Full",
    pattern: Annotated[str | None, typer.Option(metavar="SPEC", help="2:4 ..., for methods that choose the mask")] = None,
    sparsity: Annotated[float | None, typer.Option(help="fraction of zeros, for methods that choose the mask")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the dense model; by default the one MODEL was pruned from")
    ] = None,
    loss: Annotated[str, typer.Option(metavar="SPEC", help="distill, distill(task=0.0, hidden=1.0) ..., or task")] = "distill",
    rate: Annotated[float | None, typer.Option(help="learning rate at its highest; by default the method's")] = None,
    batch: Annotated[int, typer.Option(help="windows a step")] = 4,
    micro: Annotated[int | None, typer.Option(help="windows a pass, where a step's are too many at once")] = None,
    seqlen: SeqLen = 512,
    seed: Annotated[int, typer.Option(help="for the order of the text, and what a method draws")] = 0,
    eval_data: Annotated[str | None, typer.Option(help="text to measure perplexity on, before and after")] = None,
    windows: Annotated[int | None, typer.Option(help="evaluate on the first so many windows")] = None,
    eval_seqlen: Annotated[int, typer.Option(help="tokens in a window of the evaluation")] = 512,
    targets: Targets = None,
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train a pruned model and keep its zeros, into a new directory; started again after a kill, it goes on."""
    from gossamer.models import resolve
    from gossamer.recovering import read
    from gossamer.recovering import recover as run

    if windows is not None and eval_data is None:
        raise GossamerError("--windows are of --eval-data, and there is none")
    read(method, pattern, sparsity, steps)  # a slip in these shows before a model is fetched
    report = run(
        resolve(model, say=speaker(quiet)),
        to,
        method,
        pattern,
        data=data,
        steps=steps,
        teacher=teacher,
        loss=loss,
        sparsity=sparsity,
        rate=rate,
        batch=batch,
        micro=micro,
        seqlen=seqlen,
        seed=seed,
        evaluate=eval_data,
        evaluated=windows,
        eval_seqlen=eval_seqlen,
        targets=targets,
        device=device_of(device),
        progress=progress_of(quiet),
        force=force,
        name=None if Path(model).is_dir() else model,
    )
    if quiet:
        return
    trained = report.training or {}
    out.print(str(report))
    if report.evaluation:
        dense = f", dense {number(trained['dense'])}" if "dense" in trained else ""
        out.print(f"perplexity {number(trained['before'])} → {number(report.evaluation['perplexity'])}{dense}")
    if trained["rounded"]:
        out.print(f"{trained['rounded']:,} kept weights became zero when cast to {report.model['dtype']}")
    out.print(f"wrote {to}; next: gossamer eval {to}")


@app.command("run")
def run_recipe(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.json", help="prune, shrink, recover, evaluate and pack, in one file")
    ],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="receives a directory a step, and index.html")],
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Take a model through the steps of a recipe; started again after a kill, it goes on."""
    from gossamer.recipe import Recipe, run

    asked = Recipe.load(recipe)
    document = run(
        asked, to, device=device_of(device), force=force, command=typed(), progress=progress_of(quiet), say=speaker(quiet)
    )
    draw([document], to / "index.html")
    write(to / "runs.json", document)
    if not quiet:
        print_comparison(document)
        out.print(f"the page: {to / 'index.html'}   the models: {to}")
