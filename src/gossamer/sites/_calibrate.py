"""Calibration: take the windows through the model block by block, and hand over each weight with its input statistics.

The model's own forward does the work: blocks that are done hand on what they put out, so masks, rotary embeddings and every
other argument of a block are the ones its model really passes. All lanes go through a block in lockstep: a weight is handed
over when its inputs are complete, may be changed there and then, and the pass goes on through the changed weight.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.core.stats import PAIRED, Stats
from gossamer.sites._gather import Gatherer
from gossamer.sites._lockstep import Lane, lockstep
from gossamer.sites._rows import give_back
from gossamer.sites._walk import Target, blocks_of, text_config

Batch = Mapping[str, Tensor]
Visit = Callable[[Target, list[Stats]], None]


class Call(NamedTuple):
    """One call of a module by its model: its arguments and what it answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Stop(BaseException):
    """Ends a forward pass once the block in hand has put out its result."""


class Calibration:
    """The state of one walk: the inputs of each lane, and what each lane put out of the last finished block.

    Args:
        model: a transformers model with one stack of blocks.
        batches: keyword arguments of the model, one mapping a lane.
        needs: what to gather of `INPUTS`; the norms are there whatever it says.
        device: where a block goes while it is worked on; None leaves the model where it is.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], needs: frozenset[str], *, device: torch.device | None = None
    ) -> None:
        self.model, self.batches, self.needs, self.device = model, batches, needs, device
        self.name, self.blocks = blocks_of(model)
        # For "cross" or "dense" there are twice as many: the second half goes through the blocks as they were before pruning.
        self.lanes = list(batches) * (2 if needs & PAIRED else 1)
        self.outputs: list[Any] = [None] * len(self.lanes)
        self._lane = 0  # the lane whose turn it is

    def block(self, index: int, targets: Sequence[Target], visit: Visit) -> None:
        """Take all lanes through one block; ``visit`` gets each target with the statistics of its input, once.

        A stacked expert weight comes with one `Stats` an expert, of the tokens routed to it.
        """
        by_module: dict[nn.Module, list[Target]] = {}
        for target in targets:
            by_module.setdefault(target.module, []).append(target)
        gatherer = Gatherer(by_module, self.needs)
        order = {module: position for position, module in enumerate(by_module)}

        done: set[nn.Module] = set()

        def deal_with(module: object) -> None:
            assert isinstance(module, nn.Module)
            done.add(module)
            for target in by_module[module]:
                visit(target, gatherer.take(target))
            give_back()

        twin = copy.deepcopy(self.blocks[index]) if self.needs & PAIRED else None  # before anything hangs on it
        with self._entered(index) as (here, home), ExitStack() as stack:
            if twin is not None:
                self._pair(here, twin.to(self.device), by_module, gatherer, stack)
            stack.enter_context(hooked(here.register_forward_hook(lambda _m, _a, out: self._finish(out, home))))
            for module in by_module:
                stack.enter_context(hooked(module.register_forward_pre_hook(lambda m, args: self._arrive(gatherer, m, args))))
            self._lanes: dict[int, Lane] = {}
            count = len(self.batches)
            # The dense lanes first: what they bring to a module is there when the others come.
            lockstep([self._body(i) for i in (*range(count, len(self.lanes)), *range(count))], lambda m: order[m], deal_with)  # type: ignore[index]
            for module in by_module:
                if module not in done:  # no token came this way: an expert kept in a module of its own
                    deal_with(module)
        give_back()

    def _pair(
        self,
        here: nn.Module,
        twin: nn.Module,
        by_module: Mapping[nn.Module, Sequence[Target]],
        gatherer: Gatherer,
        stack: ExitStack,
    ) -> None:
        """Let the dense lanes go through a copy of the block, and pause there where the others do."""
        own, count = here.forward, len(self.batches)
        stack.enter_context(forwarding(here, lambda *a, **k: (twin if self._lane >= count else own)(*a, **k)))
        for module, double in zip(here.modules(), twin.modules(), strict=True):
            if module in by_module:

                def arrive(_m: nn.Module, args: tuple[Any, ...], module: nn.Module = module) -> None:
                    gatherer.add_dense(self._lane - count, module, args)
                    self._pause(module)

                stack.enter_context(hooked(double.register_forward_pre_hook(arrive)))

    @torch.no_grad()
    def calls(self, index: int, module: nn.Module, *, answered: bool = True, lanes: int | None = None) -> list["Call"]:
        """Return how each lane calls a module: block ``index`` itself, or one in it. Nothing is gathered, and nothing changed.

        Args:
            answered: run the module and return its outputs too; otherwise the pass stops before it.
            lanes: only the first so many.
        """
        found: list[Call] = []
        with self._entered(index) as (_, home), ExitStack() as stack:

            def stop(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
                found.append(Call(moved(args, home), moved(kwargs, home), moved(output, home)))
                raise _Stop

            register = module.register_forward_hook if answered else module.register_forward_pre_hook
            stack.enter_context(hooked(register(stop, with_kwargs=True)))
            for lane in range(len(self.batches))[:lanes]:
                self._pass(lane)
        return found

    @contextmanager
    def _entered(self, index: int) -> Iterator[tuple[nn.Module, torch.device]]:
        """Let the blocks before ``index`` answer from their lanes' outputs, and put this one on the device."""
        with ExitStack() as stack:
            for done in self.blocks[:index]:
                stack.enter_context(forwarding(done, lambda *_, **__: self.outputs[self._lane]))
            stack.enter_context(eager_experts(self.model))
            here = self.blocks[index]
            home = next((p.device for p in here.parameters()), torch.device("cpu"))
            if self.device is not None:
                here.to(self.device)
                stack.callback(here.to, home)
                stack.enter_context(hooked(here.register_forward_pre_hook(self._bring, with_kwargs=True)))
            yield here, home

    def _body(self, index: int) -> Callable[[Lane], None]:
        def run(lane: Lane) -> None:
            self._lanes[index] = lane
            self._pass(index)

        return run

    def _pass(self, lane: int) -> None:
        self._lane = lane
        try:
            self.model(**self.lanes[lane], use_cache=False)
        except _Stop:
            return
        raise GossamerError(f"the forward pass of {type(self.model).__name__} never came to the block in {self.name}")

    def _arrive(self, gatherer: "Gatherer", module: nn.Module, args: tuple[Any, ...]) -> None:
        gatherer.add(self._lane, module, args)
        self._pause(module)

    def _pause(self, module: nn.Module) -> None:
        index = self._lane
        self._lanes[index].pause(module)
        self._lane = index

    def _bring(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return moved(args, self.device), moved(kwargs, self.device)

    def _finish(self, output: Any, home: torch.device) -> None:
        self.outputs[self._lane] = moved(output, home) if self.device is not None else output
        raise _Stop


@contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let one module instance answer with another forward for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Let stacked experts run one after the other, the form in which each one's tokens can be seen."""
    configs = {id(c): c for c in (model.config, text_config(model)) if hasattr(c, "_experts_implementation")}
    before = {key: c._experts_implementation for key, c in configs.items()}
    for c in configs.values():
        c._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, c in configs.items():
            c._experts_implementation = before[key]


@contextmanager
def hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def moved(value: Any, device: torch.device | None) -> Any:
    """Move the tensors of nested tuples, lists and dicts to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(v, device) for v in value)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return value
