"""The loop of `gossamer recover`: as plain as one can be, but for going on where it stopped."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.tuner import Tuning
from gossamer.recovering._state import State
from gossamer.sites.weights import bar

FRESH = 5.0  # seconds that a count of zeros is good for


@dataclass(frozen=True)
class Plan:
    """How the loop runs: steps of ``batch`` windows, ``micro`` at a time; learning rate; the norm that gradients are cut to."""

    steps: int
    batch: int
    micro: int
    rate: float
    clip: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro", "rate", "clip"):
            if not getattr(self, name) > 0:
                raise GossamerError(f"{name} is more than 0, not {getattr(self, name)}")

    def factor(self, step: int) -> float:
        """Return what the rate is multiplied with: up over a tenth of the steps, then straight down to nothing."""
        warm = max(self.steps // 10, 1)
        return min((step + 1) / warm, 1 - step / self.steps)

    def batches(self, windows: Tensor, begin: int) -> Iterator[Tensor]:
        """Yield each step's windows: every window once, in an order drawn with the seed, then all of them again."""
        generator, order = torch.Generator().manual_seed(self.seed), torch.empty(0, dtype=torch.int64)
        for step in range(self.steps):
            while len(order) < self.batch:
                order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
            if step >= begin:
                yield windows[order[: self.batch]]
            order = order[self.batch :]


class Broken(GossamerError):
    """The loss or a gradient was not finite; the model is as it was after ``step`` steps."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} is not finite at step {step + 1}")
        self.step = step


def run(
    tuning: Tuning,
    loss: Callable[..., Tensor],
    windows: Tensor,
    plan: Plan,
    state: State,
    *,
    every: float,
    progress: bool | None,
    title: str,
    watched: Sequence[nn.Parameter] = (),
) -> float:
    """Train, from where ``state`` stands; return the seconds that all of its runs took.

    ``watched`` are weights whose zeros the progress bar counts, every few seconds.

    Raises:
        Broken: the loss or the gradients became NaN or infinite; that step was not taken.
    """
    parameters = tuning.parameters()
    where = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.0, fused=True)
    tuning.attach(optimizer)
    torch.manual_seed(plan.seed)
    state.load(tuning, optimizer)
    model = tuning.model.train()
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda")
    begun, started = state.seconds, time.perf_counter()
    zeros = _Zeros(watched)
    with bar(plan.steps, title, progress) as shown:
        shown.update(state.step)
        for step, batch in enumerate(plan.batches(windows, state.step), state.step):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * plan.factor(step)
            total = 0.0
            for part in batch.split(plan.micro):  # type: ignore[no-untyped-call]
                ids = part.to(where)
                with autocast:
                    found = loss(model(ids), ids) * (len(part) / len(batch))
                if not torch.isfinite(found):
                    raise Broken(step, "the loss")
                found.backward()  # type: ignore[no-untyped-call]
                total += float(found.detach())
            norm = nn.utils.clip_grad_norm_(parameters, plan.clip)
            if not torch.isfinite(norm):
                raise Broken(step, "a gradient")
            optimizer.step()
            optimizer.zero_grad()
            state.losses.append(total if math.isfinite(total) else None)
            shown.set_postfix_str(_told(total, loss) + zeros.told(), refresh=False)
            shown.update()
            seconds = begun + time.perf_counter() - started
            if step + 1 < plan.steps and time.perf_counter() - state.kept >= every:
                state.save(step + 1, tuning, optimizer, seconds)
    return begun + time.perf_counter() - started


def _told(total: float, loss: Any) -> str:
    parts = getattr(loss, "parts", {})
    return f"loss {total:.3f}" + "".join(f", {name} {float(value):.3f}" for name, value in parts.items() if len(parts) > 1)


class _Zeros:
    """The share of zeros in some weights, counted anew when the last count is a few seconds old."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights, self._said, self._when = weights, "", 0.0

    def told(self) -> str:
        if self._weights and time.perf_counter() - self._when > FRESH:
            kept = sum(int(w.detach().count_nonzero()) for w in self._weights)
            size = sum(w.numel() for w in self._weights)
            self._said, self._when = f", {1 - kept / size:.2%} zeros held", time.perf_counter()
        return self._said
