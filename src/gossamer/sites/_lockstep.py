"""Lockstep: several forward passes that wait for one another, so that one pass can both measure and be pruned.

Each lane is a forward pass over some of the calibration windows. A lane pauses where it is about to use a weight; when every
lane that will use it has come, the weight is pruned, and the lanes go on through what was pruned. Lanes are coroutines on one
thread, so memory holds what is alive at the pauses plus the temporaries of a single lane. (Threads that take turns would do the
same, but each brings an allocator arena and a pool of workers of its own.)
"""

import contextvars
from collections.abc import Callable, Sequence

import torch
from greenlet import GreenletExit, getcurrent, greenlet

Body = Callable[["Lane"], None]


class Lane:
    """One forward pass; `pause` gives the turn back until the lane is resumed."""

    def __init__(self, body: Body) -> None:
        self.waiting_at: object | None = None
        self._conductor = getcurrent()
        self._coroutine = greenlet(lambda: body(self))
        self._coroutine.gr_context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        return bool(self._coroutine.dead)

    def pause(self, key: object) -> None:
        """Wait at ``key`` until it has been dealt with."""
        self.waiting_at = key
        self._conductor.switch()

    def resume(self) -> None:
        """Let the lane run to its next pause or its end; an error in it is raised here."""
        self.waiting_at = None
        self._coroutine.switch()

    def abandon(self) -> None:
        """End a paused lane where it is, its own clean-up included."""
        self._coroutine.throw(GreenletExit)


@torch.no_grad()
def lockstep(bodies: Sequence[Body], order: Callable[[object], int], visit: Callable[[object], None]) -> None:
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
                lane.abandon()
