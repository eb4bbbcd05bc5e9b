"""The command that removes structure: shrink."""

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli._shared import (
    Device,
    Force,
    Model,
    Quiet,
    Sampled,
    Samples,
    Seed,
    SeqLen,
    app,
    device_of,
    out,
    progress_of,
    speaker,
)  # fmt: skip
from gossamer.core.errors import GossamerError


@app.command()
def shrink(
    model: Model,
    method: Annotated[str, typer.Option(metavar="SPEC", help="Depth, CFSP ...: see gossamer ls structures")],
    to: Annotated[Path, typer.Option("--out", metavar="DIR", help="the smaller model's directory")],
    sparsity: Annotated[float | None, typer.Option(help="fraction of the blocks' parameters that goes, in (0, 1)")] = None,
    speedup: Annotated[float | None, typer.Option(help="instead: how many times as fast, measured here")] = None,
    at: Annotated[str | None, typer.Option(metavar="BATCHxTOKENS", help="the pass that --speedup is of; else 1x512")] = None,
    data: Annotated[str | None, typer.Option(help="calibration text: a file, a folder, builtin, a data set")] = None,
    seqlen: SeqLen = 512,
    samples: Samples = 32,
    sample: Sampled = "random",
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Remove whole blocks, heads or channels: a smaller ordinary dense model, in a new directory; started again, it goes on."""
    from gossamer.models import resolve
    from gossamer.sites._shrinking import shrink_checkpoint
    from gossamer.sites.checkpoint import check_out
    from gossamer.sites.shrinking import goal_of, opens, structure_of

    how, say = structure_of(method), speaker(quiet)  # a slip in these shows before a model is fetched
    if at is not None and speedup is None:
        raise GossamerError("--at is the pass that --speedup is of, and there is none")
    shape = _shape(at or "1x512")
    goal_of(how, sparsity, speedup, shape)
    path = resolve(model, say=say)
    check_out(to, path, force)
    say(f"when it is done, {opens(how.even, to)}")
    report = shrink_checkpoint(
        path,
        to,
        how,
        sparsity=sparsity,
        speedup=speedup,
        at=shape,
        data=data,
        seqlen=seqlen,
        samples=samples,
        sample=sample,
        seed=seed,
        device=device_of(device),
        progress=progress_of(quiet),
        force=force,
        name=model,
        say=say,
    )
    if quiet:
        return
    out.print(str(report))
    assert report.structure is not None
    if report.structure["plain"] != how.even:  # it came out otherwise than was to be expected
        out.print(opens(report.structure["plain"], to))
    out.print(f"wrote {to}; next: gossamer eval {to}")


def _shape(at: str) -> tuple[int, int]:
    batch, _, tokens = at.partition("x")
    if not (batch.isdecimal() and tokens.isdecimal()):
        raise GossamerError(f"--at is BATCHxTOKENS, such as 1x512; got {at!r}")
    return int(batch), int(tokens)
