"""What the commands share: their options, what is said and shown, and how text becomes values."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from gossamer.core.errors import GossamerError

app = typer.Typer(
    name="gossamer",
    help="Prune, pack, measure and compare neural networks with zeros in their weights.",
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
Allocate = Annotated[
    str, typer.Option(metavar="SPEC", help="uniform, erk, global_, owl, searched ...: `gossamer ls allocations`")
]

TasksDir = Annotated[Path | None, typer.Option(help="a folder of lm-eval task files of your own")]
Limit = Annotated[int | None, typer.Option(help="only so many examples of each task")]


def speaker(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: err.print(line))


def progress_of(quiet: bool) -> bool | None:
    return False if quiet else None


def typed() -> str:
    import shlex

    return shlex.join(["gossamer", *sys.argv[1:]])


def split(text: str, at: str) -> list[str]:
    return [part.strip() for part in text.split(at) if part.strip()]


def fractions(text: str) -> list[float]:
    """Read fractions separated by commas; first:last:step is a grid that holds both ends."""
    try:
        found: list[float] = []
        for part in split(text, ","):
            first, *rest = (float(number) for number in part.split(":"))
            last, step = rest or (first, 1.0)
            if not step > 0 or last < first:
                raise ValueError
            found += [round(first + i * step, 9) for i in range(math.floor((last - first) / step + 1e-9) + 1)]
        return list(dict.fromkeys(found))
    except ValueError:
        raise GossamerError(
            f"--sparsity wants fractions separated by commas, such as 0.5,0.7, or first:last:step; got {text!r}"
        ) from None


def device_of(name: str | None) -> str | None:
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


def draw(documents: list[dict[str, Any]], path: Path) -> None:
    from gossamer.core.atomic import write_text
    from gossamer.html import page

    write_text(path, page(documents))


def check_file(path: Path | None) -> None:
    """Raise before any work, rather than after it, if the result could not become this file."""
    if path is not None and path.is_dir():
        raise GossamerError(f"{path} is a directory; give a file")
    above = next((folder for folder in path.absolute().parents if folder.exists()), None) if path is not None else None
    if above is not None and not above.is_dir():
        raise GossamerError(f"cannot write {path}: {above} is a file")


def write(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        from gossamer.core.atomic import write_text

        write_text(path, json.dumps(value, indent=1) + "\n")


def show(table: Table) -> None:
    """Print a table, in full where it is not read on a terminal; nothing in it is cut short."""
    for column in table.columns:
        column.overflow = "fold"
    wide = None if out.is_terminal else 200
    Console(width=wide, highlight=False, markup=False, emoji=False).print(table)


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def print_comparison(document: dict[str, Any], *, best_first: bool = False) -> None:
    """Print a comparison as a table, in the order of its runs or the best of each pattern and sparsity first."""
    from gossamer.ranking import ranked, rows_of

    dense, rows = (document["dense"] or {}).get("perplexity"), (ranked if best_first else rows_of)(document)
    answered = [task for task in (document["dense"] or {}).get("tasks") or {} if any(task in row["tasks"] for row in rows)]
    timed = any(row["speed"] for row in rows)
    speed = ["tokens/s dense → packed", "×"] if timed else []
    table = Table("method", "pattern", "sparsity", "perplexity", "× dense", *answered, "seconds", "MB dense → bitmask", *speed)
    right = [_accuracy(document["dense"]["tasks"][task].get("acc")) for task in answered]
    size = document["model"]["bytes"]
    table.add_row("dense", "–", "0", number(dense), "1.00", *right, "–", f"{size / 1e6:.0f}", *("–" for _ in speed))
    for row in rows:
        found, packed = row["perplexity"], size - row["bytes_dense"] + row["bytes_bitmask"]
        spread = "" if row["spread"] is None else f" ± {row['spread'] / 2:.2f}"
        table.add_row(
            row["method"],
            row["pattern"] or "–",
            f"{row['sparsity']:.4f}",
            number(found) + spread if row["evaluated"] else "–",
            "–" if not (found and dense) else f"{found / dense:.2f}",
            *(_accuracy(row["tasks"].get(task)) for task in answered),
            f"{row['seconds']:.1f}",
            f"{size / 1e6:.0f} → {packed / 1e6:.0f}",
            *(_rates(row["speed"]) if timed else []),
        )
    show(table)


def _accuracy(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _rates(speed: dict[str, Any] | None) -> list[str]:
    if not speed:
        return ["–", "–"]
    rates = [speed["batch"] / speed[kind] for kind in ("dense", "packed")]
    return [f"{rates[0]:.1f} → {rates[1]:.1f}", f"{speed['ratio']:.2f}"]
