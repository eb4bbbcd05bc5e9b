"""The commands that prune and judge: prune, eval, compare, report, ls, demo."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from gossamer.cli._shared import (
    Allocate,
    Device,
    Force,
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
    err,
    fractions,
    out,
    print_comparison,
    progress_of,
    show,
    speaker,
    split,
    typed,
    write,
)  # fmt: skip
from gossamer.core.errors import GossamerError
from gossamer.shapes import SHAPES

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

    Job.of(method, pattern, sparsity, allocate)  # a slip in these shows before a model is fetched
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
        out.print(f"wrote {to}; next: gossamer eval {to}")


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="evaluation text: a file, a folder, builtin, a data set")] = "builtin",
    seqlen: SeqLen = 512,
    windows: Annotated[int | None, typer.Option(help="only the first so many windows")] = None,
    batch: Annotated[int, typer.Option(help="windows, or examples, a forward")] = 1,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks instead, separated by commas")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="a folder of lm-eval task files of your own")] = None,
    limit: Annotated[int | None, typer.Option(help="only so many examples of each task")] = None,
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


@app.command()
def compare(
    model: Model,
    methods: Annotated[str, typer.Option(metavar="SPECS", help="separated by ';'")] = "Magnitude;Wanda;SparseGPT",
    pattern: Annotated[str, typer.Option(metavar="SPECS", help="separated by ';'")] = "Unstructured;2:4",
    sparsity: Annotated[str, typer.Option(metavar="LIST", help="fractions of zeros, separated by commas")] = "0.5",
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="receives compare.json and index.html")] = Path("compare"),
    data: Annotated[str, typer.Option(help="calibration text")] = "builtin",
    eval_data: Annotated[str | None, typer.Option(help="evaluation text, if it is another")] = None,
    windows: Annotated[int | None, typer.Option(help="evaluate on the first so many windows")] = None,
    seqlen: SeqLen = 512,
    samples: Samples = 32,
    sample: Sampled = "random",
    seed: Seed = 0,
    allocate: Allocate = "uniform",
    targets: Targets = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="save every pruned model under DIR/models")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="pack each model too where that pays, and time its decoding")] = False,
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Prune one model by several methods, patterns and sparsities: one table, one page. Goes on where it stopped."""
    from gossamer.compare import compare as run
    from gossamer.models import resolve

    check_file(to_json)
    document = run(
        resolve(model, say=speaker(quiet)),
        split(methods, ";"),
        split(pattern, ";"),
        fractions(sparsity),
        to,
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
        keep_models=keep_models,
        speed=speed,
        name=model,
        command=typed(),
        progress=progress_of(quiet),
        say=speaker(quiet),
    )
    draw([document], to / "index.html")
    write(to_json, document)
    print_comparison(document)
    if not quiet:
        out.print(f"the page: {to / 'index.html'}   the numbers: {to / 'compare.json'}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json ...", help="report.json or compare.json files")],
    to: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the page")] = Path("report.html"),
    force: Force = False,
) -> None:
    """Draw one self-contained page from reports."""
    from gossamer.core.report import read_json

    if to.exists() and not force:
        raise GossamerError(f"{to} exists; give another file, or --force to replace it")
    draw([read_json(path) for path in runs], to)
    out.print(f"wrote {to}")


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
            table = Table(title, "needs", "what it is", box=None, title_justify="left", padding=(0, 2, 0, 0))
            for thing in things:
                table.add_row(thing["signature"], ", ".join(thing["needs"]) or "–", thing["summary"])
            show(table)
            out.print()


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", metavar="DIR")] = Path("gossamer-demo"),
    quiet: Quiet = False,
) -> None:
    """Prune SmolLM2-135M by three methods at 50 % and 2:4, measure, save, pack, time and draw: the main job end to end."""
    from gossamer.compare import compare as run
    from gossamer.models import resolve

    say = speaker(quiet)
    say("Gossamer demo: SmolLM2-135M, a real language model, pruned by Magnitude, Wanda and SparseGPT at 50 % and 2:4,")
    say("calibrated and measured on two disjoint parts of Python's own help text, then packed where that makes it faster")
    say("here, and timed. About 12 minutes on 2 cores, 4 GB of disk.")
    path = resolve("smollm2", say=say)
    methods, patterns = ["Magnitude", "Wanda", "SparseGPT"], ["Unstructured", "2:4"]
    document = run(
        path, methods, patterns, [0.5], to, windows=32, keep_models=True, speed=True, name="smollm2", command="gossamer demo",
        progress=progress_of(quiet), say=say,
    )  # fmt: skip
    draw([document], to / "index.html")
    print_comparison(document)
    best = min((to / "models").glob("sparsegpt-unstructured*"))
    say(f"\nThe page:   {to / 'index.html'}   (open it in a browser)")
    say(f"The models: {to / 'models'}   (ordinary transformers directories)")
    say(f"The numbers: {to / 'compare.json'}")
    say("\nNext, try:")
    say(f"  gossamer eval {best} --windows 8")
    say("  gossamer prune smollm2 --method SparseGPT --pattern 4:8 --data builtin --out pruned")
    say(f"  gossamer plan {next(iter(SHAPES))}")
    say("  gossamer ls")
