"""The commands that prune and judge: prune, eval, ls."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from gossamer.cli._shared import (
    Allocate,
    Device,
    Force,
    Json,
    Limit,
    Model,
    Quiet,
    Sampled,
    Samples,
    Seed,
    SeqLen,
    Targets,
    TasksDir,
    app,
    check_file,
    device_of,
    err,
    out,
    progress_of,
    show,
    speaker,
    write,
)  # fmt: skip
from gossamer.core.errors import GossamerError

Kind = Literal["scores", "solvers", "structures", "tuners", "patterns", "allocations", "schedules", "formats", "sites"]


@app.command()
def prune(
    model: Model,
    method: Annotated[str, typer.Option(metavar="SPEC", help="Magnitude, Wanda, SparseGPT(damp=0.02) ...")],
    pattern: Annotated[str, typer.Option(metavar="SPEC", help="Unstructured, Unstructured(per='row'), 2:4, 4x1 ...")],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="the pruned model's directory")],
    sparsity: Annotated[float | None, typer.Option(help="fraction of zeros, in [0, 1)")] = None,
    allocate: Allocate = "uniform",
    data: Annotated[str | None, typer.Option(help="calibration text: a file, a folder, builtin, a data set")] = None,
    seqlen: SeqLen = 512,
    samples: Samples = 32,
    sample: Sampled = "random",
    seed: Seed = 0,
    targets: Targets = None,
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model into a new directory, one block in memory at a time; started again after a kill, it goes on."""
    from gossamer.models import resolve
    from gossamer.sites._job import Job
    from gossamer.sites.checkpoint import prune_checkpoint

    Job.of(method, pattern, sparsity, allocate).check_data(data)  # a slip in these shows before a model is fetched
    report = prune_checkpoint(
        resolve(model, say=speaker(quiet)),
        to,
        method,
        pattern,
        sparsity=sparsity,
        allocate=allocate,
        data=data,
        seqlen=seqlen,
        samples=samples,
        sample=sample,
        seed=seed,
        targets=targets,
        device=device_of(device),
        progress=progress_of(quiet),
        force=force,
        name=model,
    )
    if not quiet:
        out.print(str(report))
        if report.totals["nnz"] in (0, report.totals["entries"]):
            out.print(f"note: {'nothing is left of the pruned weights' if not report.totals['nnz'] else 'nothing was pruned'}")
        out.print(f"wrote {to}; next: gossamer eval {to}")


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="evaluation text: a file, a folder, builtin, a data set")] = "builtin",
    seqlen: SeqLen = 512,
    windows: Annotated[int | None, typer.Option(help="only the first so many windows")] = None,
    batch: Annotated[int, typer.Option(help="windows, or examples, a forward")] = 1,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks instead, separated by commas")] = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on a text, or hand the model to lm-eval."""
    from gossamer import data as text
    from gossamer import evaluate as measure
    from gossamer.compare import shown
    from gossamer.models import causal_lm, resolve, tokenizer

    where = device_of(device)
    check_file(to_json)
    if tasks is None and (limit is not None or tasks_dir is not None):
        raise GossamerError("--limit and --tasks-dir are for --tasks")
    path = resolve(model, say=speaker(quiet))
    if tasks is not None:
        result: dict[str, Any] = {"tasks": measure.tasks(path, tasks, tasks_dir, limit=limit, batch=batch, device=where)}
        table = Table("task", "metric", "value")
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        show(table)
    else:
        ids = text.evaluation(data, tokenizer(path), seqlen=seqlen, first=windows)
        loaded = causal_lm(path, device=where)
        result = {**measure.perplexity(loaded, ids, batch=batch, progress=shown("eval", progress_of(quiet))), "data": data}
        found = "not finite" if result["perplexity"] is None else f"{result['perplexity']:.4f}"
        out.print(f"perplexity {found} over {result['tokens']:,} tokens, {result['windows']} windows of {seqlen}")
        if "note" in result:
            err.print(result["note"])
    write(to_json, {"model": model, **result})


@app.command("ls")
def list_names(
    kind: Annotated[
        Literal["scores", "solvers", "structures", "tuners", "patterns", "allocations", "schedules", "formats", "sites"] | None,
        typer.Argument(),
    ] = None,
) -> None:
    """List what there is, with what each needs and where it comes from."""
    from gossamer.catalogue import catalogue

    for title, things in catalogue().items():
        if kind in (None, title):
            shaped = ["patterns"] if any(thing["patterns"] for thing in things) else []
            table = Table(title, "needs", *shaped, "what it is", box=None, title_justify="left", padding=(0, 2, 0, 0))
            for thing in things:
                said = [", ".join(thing[column]) or "–" for column in ("needs", *shaped)]
                table.add_row(thing["signature"], *said, thing["summary"])
            show(table)
            out.print()
