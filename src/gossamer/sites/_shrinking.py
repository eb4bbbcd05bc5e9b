"""Shrink from one directory to another, and go on where a run before was stopped."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.core.atomic import publish
from gossamer.core.report import Report
from gossamer.core.structure import Structure
from gossamer.models import causal_lm, check_directory, skeleton, tokenizer
from gossamer.sites._run import Run
from gossamer.sites.checkpoint import check_out, digest, identity, save
from gossamer.sites.shrinking import goal_of, shrink, structure_of, windows_of
from gossamer.sites.weights import LANES


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
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Shrink the model in ``source`` into a new directory ``out``, which appears whole or not at all; all of it is in memory.

    A run that was killed and is started again with the same arguments, on the same windows, goes on after the last finished
    step of methods that take many (`AdaptPruner`, `Tyr`, `ZipLM`); the others start over, and so do times that are measured.

    Args:
        source: a directory with config.json, safetensors and a tokenizer.
        out: where the result goes; it must be empty or absent unless ``force``.
        name: what the report calls the model.
        say: told, in one line, where it goes on.
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
    # Drawn before the folder is looked at: a slip must not cost what a run before has found.
    batches = windows_of(skeleton(source), how, *drawn.values(), lanes=LANES, tokenizer=tokens, folder=source)
    same = {"method": repr(how), **goal, "data": digest(batches), "source": identity(source), "device": str(device)}
    with Run(Path(out), same) as run:
        if kept := len(run.state.get("steps", [])):
            say(f"goes on where the run before was stopped (steps done: {kept})")
        model = causal_lm(source)
        report = shrink(model, how, **goal, data=batches or None, device=device, progress=progress, once=run.once)
        report.model["name"] = name or str(source)
        report.recipe |= {**drawn, "data": str(data)} if batches else {}
        report.recipe["command"] = command_of(report.model["name"], report.recipe, str(out))
        check_out(Path(out), source, force)  # again: another run may have finished in the meantime
        finished = run.folder / "finished"
        save(model, finished, report=report, tokenizer=tokens, force=True)
        publish(finished, run.out)
    return report


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
