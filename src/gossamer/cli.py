"""The command line: text in → verb → Report out."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from gossamer.core.errors import GossamerError

app = typer.Typer(
    name="gossamer",
    help="Prune, measure and compare neural networks with zeros in their weights.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # a path may hold [brackets]
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a directory, a Hugging Face id, or smollm2")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars, no messages")]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as one JSON object")]
SeqLen = Annotated[int, typer.Option(help="tokens in a window")]
Samples = Annotated[int, typer.Option(help="calibration windows")]
Seed = Annotated[int, typer.Option(help="for the windows drawn by --sample random")]
Sampled = Annotated[Literal["first", "random"], typer.Option(help="how calibration windows are chosen")]
Device = Annotated[str | None, typer.Option(help="where to compute, such as cuda; pruning takes one block there at a time")]
Targets = Annotated[
    str | None, typer.Option(metavar="NAMES", help="which weights, by comma-separated names or globs: '*.mlp.*'")
]
Allocate = Annotated[str, typer.Option(metavar="SPEC", help="uniform, erk, global_ or owl")]


def _version(asked: bool) -> None:
    if asked:
        from gossamer import __version__

        out.print(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="say which this is")] = False,
) -> None:
    pass


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
    from gossamer.load import resolve
    from gossamer.sites._job import Job
    from gossamer.sites.checkpoint import prune_checkpoint

    Job.of(method, pattern, sparsity, allocate)  # a slip in these shows before a model is fetched
    report = prune_checkpoint(
        resolve(model, say=_say(quiet)),
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
        device=_device(device),
        progress=_progress(quiet),
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
    from gossamer.load import causal_lm, resolve, tokenizer

    where = _device(device)
    _check_file(to_json)
    path = resolve(model, say=_say(quiet))
    if tasks is not None:
        result: dict[str, Any] = {"tasks": measure.tasks(path, tasks, tasks_dir, limit=limit, batch=batch, device=where)}
        table = Table("task", "metric", "value")
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        _show(table)
    else:
        ids = text.evaluation(data, tokenizer(path), seqlen=seqlen, first=windows)
        loaded = causal_lm(path, device=where)
        result = {**measure.perplexity(loaded, ids, batch=batch, progress=shown("eval", _progress(quiet))), "data": data}
        found = "not finite" if result["perplexity"] is None else f"{result['perplexity']:.4f}"
        out.print(f"perplexity {found} over {result['tokens']:,} tokens, {result['windows']} windows of {seqlen}")
        if "note" in result:
            err.print(result["note"])
    _write(to_json, {"model": model, **result})


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
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Prune one model by several methods, patterns and sparsities: one table, one page. Goes on where it stopped."""
    from gossamer.compare import compare as run
    from gossamer.load import resolve

    _check_file(to_json)
    document = run(
        resolve(model, say=_say(quiet)),
        _split(methods, ";"),
        _split(pattern, ";"),
        _fractions(sparsity),
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
        device=_device(device),
        keep_models=keep_models,
        name=model,
        command=_typed(),
        progress=_progress(quiet),
        say=_say(quiet),
    )
    _draw([document], to / "index.html")
    _write(to_json, document)
    _print_comparison(document)
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
    _draw([read_json(path) for path in runs], to)
    out.print(f"wrote {to}")


@app.command("ls")
def list_names(
    kind: Annotated[Literal["scores", "solvers", "patterns", "allocations", "schedules"] | None, typer.Argument()] = None,
) -> None:
    """List what there is, with what each needs and where it comes from."""
    from gossamer.sites._job import catalogue

    for title, things in catalogue().items():
        if kind in (None, title):
            table = Table(title, "needs", "what it is", box=None, title_justify="left", padding=(0, 2, 0, 0))
            for thing in things:
                table.add_row(thing["signature"], ", ".join(thing["needs"]) or "–", thing["summary"])
            _show(table)
            out.print()


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", metavar="DIR")] = Path("gossamer-demo"),
    quiet: Quiet = False,
) -> None:
    """Prune SmolLM2-135M by three methods at 50 % and 2:4, measure, save and draw: the main job end to end."""
    from gossamer.compare import compare as run
    from gossamer.load import resolve

    say = _say(quiet)
    say("Gossamer demo: SmolLM2-135M, a real language model, pruned by Magnitude, Wanda and SparseGPT at 50 % and 2:4,")
    say("calibrated and measured on two disjoint parts of Python's own help text. About 10 minutes on 2 cores, 4 GB of disk.")
    path = resolve("smollm2", say=say)
    methods, patterns = ["Magnitude", "Wanda", "SparseGPT"], ["Unstructured", "2:4"]
    document = run(
        path, methods, patterns, [0.5], to, windows=32, keep_models=True, name="smollm2", command="gossamer demo",
        progress=_progress(quiet), say=say,
    )  # fmt: skip
    _draw([document], to / "index.html")
    _print_comparison(document)
    best = min((to / "models").glob("sparsegpt-unstructured*"))
    say(f"\nThe page:   {to / 'index.html'}   (open it in a browser)")
    say(f"The models: {to / 'models'}   (ordinary transformers directories)")
    say(f"The numbers: {to / 'compare.json'}")
    say("\nNext, try:")
    say(f"  gossamer eval {best} --windows 8")
    say("  gossamer prune smollm2 --method SparseGPT --pattern 4:8 --data builtin --out pruned")
    say("  gossamer ls")


def main() -> None:
    """Run the command line: exit status 0 on success only, 2 with one line on stderr for a user's mistake."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except GossamerError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        # The option parser's own errors: their class has moved between typer's releases, their shape has not.
        if not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":  # what the option parser makes of an interrupt
                _interrupted()
            raise
        _fail(error.format_message())
    if status == 130:  # or that
        _interrupted()
    sys.exit(status if isinstance(status, int) else 0)


def _interrupted() -> None:
    err.print("gossamer: interrupted; the same prune, compare or demo goes on after what it had finished")
    sys.exit(130)


def _fail(message: str) -> None:
    err.print("gossamer: " + " ".join(message.split()))
    sys.exit(2)


def _say(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: err.print(line))


def _progress(quiet: bool) -> bool | None:
    return False if quiet else None


def _typed() -> str:
    import shlex

    return shlex.join(["gossamer", *sys.argv[1:]])


def _split(text: str, at: str) -> list[str]:
    return [part.strip() for part in text.split(at) if part.strip()]


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in _split(text, ",")]
    except ValueError:
        raise GossamerError(f"--sparsity wants fractions separated by commas, such as 0.5,0.7; got {text!r}") from None


def _device(name: str | None) -> str | None:
    if name is None:
        return None
    import torch

    try:
        torch.empty(0, device=name)
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise GossamerError(f"the device {name!r} cannot be used here: {' '.join(str(error).split())[:160]}") from None
    return name


def _draw(documents: list[dict[str, Any]], path: Path) -> None:
    from gossamer.core.atomic import write_text
    from gossamer.html import page

    write_text(path, page(documents))


def _check_file(path: Path | None) -> None:
    """Raise before any work, rather than after it, if the result could not become this file."""
    if path is not None and path.is_dir():
        raise GossamerError(f"{path} is a directory; give a file")


def _write(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        from gossamer.core.atomic import write_text

        write_text(path, json.dumps(value, indent=1) + "\n")


def _print_comparison(document: dict[str, Any]) -> None:
    dense = document["dense"]["perplexity"]
    table = Table("method", "pattern", "sparsity", "perplexity", "× dense", "prune s", "MB dense → bitmask")
    table.add_row("dense", "–", "0", _number(dense), "1.00", "–", f"{document['model']['bytes'] / 1e6:.0f}")
    for row in document["runs"]:
        found, total = row["evaluation"]["perplexity"], row["totals"]
        rest = document["model"]["bytes"] - total["bytes_dense"]
        table.add_row(
            row["recipe"]["method"],
            row["recipe"]["pattern"],
            f"{total['sparsity']:.4f}",
            _number(found),
            "–" if not (found and dense) else f"{found / dense:.2f}",
            f"{row['seconds']['total']:.1f}",
            f"{document['model']['bytes'] / 1e6:.0f} → {(rest + total['bytes_bitmask']) / 1e6:.0f}",
        )
    _show(table)


def _show(table: Table) -> None:
    """Print a table, in full where it is not read on a terminal; nothing in it is cut short."""
    for column in table.columns:
        column.overflow = "fold"
    wide = None if out.is_terminal else 200
    Console(width=wide, highlight=False, markup=False, emoji=False).print(table)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"
