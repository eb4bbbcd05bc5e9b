"""The loop of `gossamer recover`: as plain as one can be, but for going on where it stopped."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import GossamerError
from gossamer.core.spec import show
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.recovering._state import State
from gossamer.sites.reconstructing import Reconstruct
from gossamer.sites.weights import bar

FRESH = 5.0  # seconds that a count of zeros is good for


@dataclass(frozen=True)
class Plan:
    """How the loop runs: steps of ``batch`` windows, ``micro`` at a time; learning rate; the norm that gradients are cut to."""

    steps: int
    batch: int
    micro: int
    rate: float
    max_norm: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro", "rate", "max_norm"):
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


@dataclass(frozen=True)
class Job:
    """What is to be learnt: by which method, how, on which text, with which loss, and how often it is kept.

    ``loss`` makes a context whose value is called with outputs and labels; ``watched`` are weights whose zeros the bar counts.
    """

    method: Tuner | Reconstruct
    how: How
    plan: Plan
    loss: Callable[[nn.Module, nn.Module | None], AbstractContextManager[Any]]
    model: nn.Module
    text: Tensor
    watched: Sequence[nn.Parameter]
    every: float
    progress: bool | None


@dataclass(frozen=True)
class Outcome:
    """What came of it: the plain model, seconds of all its runs, how many parameters were trained, what there is to tell."""

    model: nn.Module
    seconds: float
    trained: int
    losses: list[float] | None = None
    blocks: list[dict[str, Any]] | None = None


class Broken(GossamerError):
    """The loss or a gradient was not finite; the model is as it was after ``step`` steps."""

    def __init__(self, step: int, what: str, tuning: Tuning) -> None:
        super().__init__(f"{what} is not finite at step {step + 1}")
        self.step, self.tuning = step, tuning


def by_steps(job: Job, state: State) -> Outcome:
    """Train by optimizer steps, from where ``state`` stands; torch's random numbers are those of the seed meanwhile.

    Raises:
        Broken: the loss or the gradients became NaN or infinite; that step was not taken.
    """
    where = next(job.model.parameters()).device
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(job.plan.seed)
        return _train(job, state)


def _train(job: Job, state: State) -> Outcome:
    plan, tuner = job.plan, job.method
    assert isinstance(tuner, Tuner)
    tuning = tuner.start(job.model, job.how)
    parameters = tuning.parameters()
    where = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.0, fused=True)
    tuning.attach(optimizer)
    if state.step:
        _restore(state.tensors(), tuning, optimizer)
    model, zeros = tuning.model.train(), _Zeros(job.watched)
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda")
    begun, started = state.seconds, time.perf_counter()
    with job.loss(model, job.how.teacher) as loss, bar(plan.steps, show(tuner), job.progress) as shown:
        shown.update(state.step)
        for step, batch in enumerate(plan.batches(job.text, state.step), state.step):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * plan.factor(step)
            total = 0.0
            for part in batch.split(plan.micro):  # type: ignore[no-untyped-call]
                ids = part.to(where)
                with autocast:
                    found = loss(model(ids), ids) * (len(part) / len(batch))
                if not torch.isfinite(found):
                    raise Broken(step, "the loss", tuning)
                found.backward()
                total += float(found.detach())
            if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, plan.max_norm)):
                raise Broken(step, "a gradient", tuning)
            optimizer.step()
            optimizer.zero_grad()
            state.told.append(total)
            shown.set_postfix_str(_told(total, loss) + zeros.told(), refresh=False)
            shown.update()
            if step + 1 < plan.steps and time.perf_counter() - state.kept >= job.every:
                state.save(step + 1, _tensors(tuning, optimizer), begun + time.perf_counter() - started)
    seconds, trained = begun + time.perf_counter() - started, sum(p.numel() for p in parameters)
    return Outcome(tuning.finish(), seconds, trained, losses=state.told)


def _tensors(tuning: Tuning, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {f"tuning.{name}": tensor for name, tensor in tuning.state_dict().items()}
    for index, parameter in enumerate(_all(optimizer)):
        tensors |= {f"optimizer.{index}.{name}": value for name, value in optimizer.state.get(parameter, {}).items()}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore(found: Mapping[str, Tensor], tuning: Tuning, optimizer: Optimizer) -> None:
    """Put model, optimizer and random numbers where the run stopped."""
    tuning.load_state_dict(_part(found, "tuning."))
    for index, parameter in enumerate(_all(optimizer)):
        mine = _part(found, f"optimizer.{index}.")  # a step counter is a number, and stays on the CPU unless fused
        optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in mine.items()}
    torch.set_rng_state(found["random"])
    if "random.cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["random.cuda"])


def _all(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
