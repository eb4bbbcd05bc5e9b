"""The commands that set methods side by side: compare, report, demo."""

from pathlib import Path
from typing import Annotated

import typer

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
    draw,
    fractions,
    out,
    print_comparison,
    progress_of,
    speaker,
    split,
    typed,
    write,
)  # fmt: skip
from gossamer.core.errors import GossamerError
from gossamer.shapes import SHAPES


@app.command()
def compare(
    model: Model,
    methods: Annotated[str, typer.Option(metavar="SPECS", help="separated by ';', or all")] = "Magnitude;Wanda;SparseGPT",
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
    seeds: Annotated[int, typer.Option(help="runs of each method, with other calibration windows")] = 1,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks to answer too, separated by commas")] = None,
    tasks_dir: TasksDir = None,
    limit: Limit = None,
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Prune one model by several methods, patterns and sparsities: one table, one page. Goes on where it stopped."""
    from gossamer.compare import compare as run
    from gossamer.models import resolve
    from gossamer.sites._jobs import jobs_of

    check_file(to_json)
    asked = split(methods, ";"), split(pattern, ";"), fractions(sparsity)
    jobs_of(*asked, allocate)  # a slip in these shows before a model is fetched
    document = run(
        resolve(model, say=speaker(quiet)),
        *asked,
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
        seeds=seeds,
        tasks=tasks,
        tasks_dir=tasks_dir,
        limit=limit,
        name=model,
        command=typed(),
        progress=progress_of(quiet),
        say=speaker(quiet),
    )
    draw([document], to / "index.html")
    write(to_json, document)
    print_comparison(document, best_first=True)
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
