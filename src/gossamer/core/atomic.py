"""Atomic writes: a reader sees the old state or the new one, never a half."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gossamer.core.errors import GossamerError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on failure it is removed.

    Raises:
        GossamerError: the disk is full or may not be written; what was there is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # gone already, or never made
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish(finished: Path, target: Path) -> None:
    """Put a finished directory in the place of ``target`` in one step; what stood there is removed afterwards."""
    try:
        if not target.exists():
            os.rename(finished, target)
            return
        _exchange(finished, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    shutil.rmtree(finished, ignore_errors=True)


def lock(folder: Path, out: Path) -> IO[bytes]:
    """Make a folder and return its lock file, locked; the system unlocks it when the process ends, however that is.

    Raises:
        GossamerError: another process holds it, working on ``out``.
    """
    import fcntl

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "wb")  # noqa: SIM115 (open as long as the run)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
        except BlockingIOError:
            file.close()
            raise GossamerError(f"another run is writing {out} now; wait for it to end, or give another directory") from None
        except FileNotFoundError:  # the run that held it has just ended and removed it
            pass
        file.close()


def cannot_write(path: Path, error: OSError) -> GossamerError:
    """Return the one clear line for a failed write."""
    return GossamerError(f"cannot write {path}: {error.strerror or error}; what was there is unchanged")


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories: one atomic system call on Linux, three renames elsewhere."""
    if sys.platform == "linux":
        at_fdcwd, exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and not libc.renameat2(at_fdcwd, bytes(a), at_fdcwd, bytes(b), exchange):
            return
    aside = b.with_name(f".{b.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except OSError:
        os.rename(aside, b)
        raise
    os.rename(aside, a)
