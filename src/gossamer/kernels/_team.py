"""torch's own threads: a compiled job runs on the OpenMP team that torch's operators run on.

A second pool would fight with torch's, whose workers spin between operators. So the job, a C function that takes one pointer,
is handed to GOMP_parallel of the OpenMP library that torch itself has loaded, with as many threads as torch is set to. A job
shares its work out by an atomic counter; it runs to the same result on any number of threads.
"""

import ctypes
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, types

JOB = types.void(types.voidptr)
SMALL = 1 << 15  # multiplications below which a second thread costs more than it brings

_forked = False
_compiling = threading.Lock()


def _after_fork() -> None:
    global _forked
    _forked = True  # an OpenMP team does not survive a fork, and a child that enters it hangs: it works alone


os.register_at_fork(after_in_child=_after_fork)


@cache
def _gomp() -> Callable[..., None] | None:
    """Return GOMP_parallel of the OpenMP library in this process (GNU's, LLVM's and Intel's have it), None without one."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    except OSError:
        return None
    for path in sorted(mapped, key=lambda path: os.path.dirname(torch.__file__) not in path):  # torch's own comes first
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            found = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if found is not None:
                found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
                return found
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@cache
def _sources() -> str:
    """Return a word for the files that every compiled function is made of beside its own."""
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.py')))):08x}"


class Compiled:
    """A C function, compiled when its address is first asked for: one with AVX-512 in it is never compiled where there is none.

    It is kept on disk for the next process where there is a place for that.
    """

    def __init__(self, signature: Any, function: Callable[..., None]) -> None:
        self.signature, self.function = signature, function
        self._made: Any = None

    @property
    def address(self) -> int:
        with _compiling:
            if self._made is None:
                self.function.__qualname__ += f"_{_sources()}"  # Numba looks whether the function's own file has changed
                try:
                    self._made = cfunc(self.signature, cache=True)(self.function)
                except RuntimeError:  # neither the package nor the home directory can be written to
                    self._made = cfunc(self.signature)(self.function)
        found: int = self._made.address
        return found


def compiled(signature: Any) -> Callable[[Callable[..., None]], Compiled]:
    """Make a C function of what is decorated."""
    return lambda function: Compiled(signature, function)


def share(job: Compiled, count: int, work: int, *operands: int) -> None:
    """Run a compiled job on as many threads as torch is set to, if it is worth them, and wait for it.

    Args:
        job: compiled as `JOB`. Its argument is an int64 array: the counter of tasks, ``count``, how many of them a task has,
            and the operands. Task t is t·n ≤ i < min(t·n + n, count).
        count: how many rows, slices ... there are to do.
        work: how many multiplications that is.
        operands: what else the job wants to know.
    """
    threads = torch.get_num_threads() if work > SMALL else 1
    each = max(-(-count // (8 * threads)), 1)  # some tasks a thread, so that none waits long for another
    entries = (ctypes.c_int64 * (3 + len(operands)))(0, count, each, *operands)
    address, pointer = job.address, ctypes.addressof(entries)
    if threads <= 1 or _forked:
        _function(address)(pointer)
    elif (gomp := _gomp()) is not None:
        gomp(address, pointer, threads, 0)
    else:
        call = _function(address)
        list(_pool(threads).map(lambda _: call(pointer), range(threads)))


@cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
