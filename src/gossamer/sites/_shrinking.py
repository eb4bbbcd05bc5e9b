"""Shrink from one directory to another, and go on where a run before was stopped."""

import shlex
from pathlib import Path
from typing import Any

from gossamer.core.atomic import cannot_write, publish
from gossamer.core.report import Report
from gossamer.core.structure import Structure
from gossamer.models import causal_lm, check_directory, tokenizer
from gossamer.sites._run import Run
from gossamer.sites.checkpoint import check_out, identity, save
from gossamer.sites.shrinking import goal_of, shrink, structure_of


def shrink_checkpoint(
    source: str | Path,
    out: str | Path,
    method: str | Structure,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    at: tuple[int, int] = (1, 512),
    data: str | Path | None = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    device: str | None = None,
    progress: bool | None = None,
    force: bool = False,
    name: str | None = None,
) -> Report:
    """Shrink the model in ``source`` into a new directory ``out``, which appears whole or not at all; all of it is in memory.

    A run that was killed and is started again with the same arguments goes on after the last finished step of methods that take
    many (`AdaptPruner`, `Tyr`, `ZipLM`); the others start over, and so do times that are measured.

    Args:
        source: a directory with config.json, safetensors and a tokenizer.
        out: where the result goes; it must be empty or absent unless ``force``.
        name: what the report calls the model.
        others: as in `gossamer.shrink`.

    Raises:
        GossamerError: anything asked for that cannot be; ``out`` is as it was.
    """
    source = Path(source)
    how = structure_of(method)
    goal_of(how, sparsity, speedup, at)
    check_directory(source)
    check_out(Path(out), source, force)
    tokens = tokenizer(source)
    drawn: dict[str, Any] = {"data": data, "seqlen": seqlen, "samples": samples, "sample": sample, "seed": seed}
    goal: dict[str, Any] = {"sparsity": sparsity, "speedup": speedup, "at": at}
    text = identity(Path(data)) if data is not None and Path(data).is_dir() else _stamp(data)
    with Run(Path(out), {"method": repr(how), **goal, **drawn, "text": text, "source": identity(source)}) as run:
        model = causal_lm(source)
        report = shrink(model, how, **goal, tokenizer=tokens, device=device, progress=progress, once=run.once, **drawn)
        report.model["name"] = name or str(source)
        report.recipe["command"] = command_of(report.model["name"], report.recipe, str(out))
        check_out(Path(out), source, force)  # again: another run may have finished in the meantime
        finished = run.folder / "finished"
        save(model, finished, report=report, tokenizer=tokens, force=True)
        try:
            publish(finished, run.out)
        except OSError as error:
            raise cannot_write(Path(out), error) from error
    return report


def _stamp(data: str | Path | None) -> list[Any]:
    """Return what tells one state of a file of text from another."""
    path = None if data is None else Path(data)
    return [path.stat().st_size, path.stat().st_mtime_ns] if path is not None and path.is_file() else []


def command_of(model: str, recipe: dict[str, Any], out: str) -> str:
    """Return the shell command that shrinks a model by this recipe."""
    words = ["gossamer", "shrink", model, "--method", recipe["method"]]
    if "speedup" in recipe:
        words += ["--speedup", str(recipe["speedup"]), "--at", "x".join(map(str, recipe["at"]))]
    else:
        words += ["--sparsity", str(recipe["sparsity"])]
    for option in ("data", "seqlen", "samples", "sample", "seed"):
        words += [f"--{option}", str(recipe[option])] if option in recipe else []
    return shlex.join([*words, "--out", out])
