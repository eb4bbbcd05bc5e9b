"""Lockstep: several forward passes that wait for one another, so that one pass can both measure and be pruned.

Each lane is a forward pass over some of the calibration windows. A lane pauses where it is about to use a weight; when every
lane that will use it has come, the weight is pruned, and the lanes go on through what was pruned. One lane runs at a time (the
threads are coroutines, not parallelism), so memory holds what is alive at the pauses plus the temporaries of a single lane.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

K = TypeVar("K")


class _Abandoned(BaseException):
    """Raised inside a paused lane when another one has failed."""


class Lane:
    """One forward pass in a thread of its own; `pause` gives the turn back until the lane is resumed."""

    def __init__(self, body: Callable[["Lane"], None]) -> None:
        self.waiting_at: object | None = None
        self.error: BaseException | None = None
        self.done = self._abandoned = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._body = body
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pause(self, key: object) -> None:
        """Wait at ``key`` until it has been dealt with."""
        self.waiting_at = key
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def resume(self, *, abandon: bool = False) -> None:
        """Let the lane run to its next pause or its end; an error in it is raised here."""
        self.waiting_at, self._abandoned = None, abandon
        self._go.release()
        self._back.acquire()
        if self.done:
            self._thread.join()
        if self.error is not None and not abandon:
            raise self.error

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():  # the grad mode belongs to a thread
                    self._body(self)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._back.release()


def lockstep(bodies: Sequence[Callable[[Lane], None]], order: Callable[[object], int], visit: Callable[[object], None]) -> None:
    """Run every body to its end, calling ``visit(key)`` once all lanes that pause at ``key`` have come to it.

    Args:
        bodies: the forward passes; each pauses with ``lane.pause(key)``.
        order: the position of a key: of the keys waited for, the first is visited. Lanes need not pause at the same keys.
        visit: what to do once a key's lanes are all there.
    """
    lanes = [Lane(body) for body in bodies]
    try:
        for lane in lanes:
            lane.resume()
        while waiting := [lane for lane in lanes if not lane.done]:
            key = min((lane.waiting_at for lane in waiting), key=order)
            visit(key)
            for lane in waiting:
                if lane.waiting_at is key:
                    lane.resume()
    finally:
        for lane in lanes:
            if not lane.done:
                lane.resume(abandon=True)
