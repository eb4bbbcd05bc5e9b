"""The command line: text in → verb → Report out."""

import sys
from typing import Annotated

import typer

from gossamer.cli import comparing, pruning, shrinking, speed, sweeping, training  # noqa: F401 (importing adds commands)
from gossamer.cli._shared import app, err, out
from gossamer.core.errors import GossamerError


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


def main() -> None:
    """Run the command line: exit status 0 on success only, 2 with one line on stderr for a user's mistake."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except GossamerError as error:
        fail(str(error))
    except KeyboardInterrupt:
        interrupted()
    except Exception as error:
        # The option parser's own errors: their class has moved between typer's releases, their shape has not.
        if not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":  # what the option parser makes of an interrupt
                interrupted()
            raise
        fail(error.format_message().replace(": Value error, ", ": "))  # some of them come through pydantic, which says so
    if status == 130:  # or that
        interrupted()
    sys.exit(status if isinstance(status, int) else 0)


def interrupted() -> None:
    err.print(
        "gossamer: interrupted; the same prune, shrink, recover, run, compare, sweep or demo goes on after what it had finished"
    )
    sys.exit(130)


def fail(message: str) -> None:
    err.print("gossamer: " + " ".join(message.split()))
    sys.exit(2)
