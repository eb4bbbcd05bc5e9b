"""Calibration: take the windows through the model block by block, and hand over each weight with its input statistics.

The model's own forward does the work: blocks that are done hand on what they put out, so masks, rotary embeddings and every
other argument of a block are the ones its model really passes. All lanes go through a block in lockstep: a weight is handed
over when its inputs are complete, may be changed there and then, and the pass goes on through the changed weight.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.core.stats import Stats
from gossamer.sites._lockstep import Lane, lockstep
from gossamer.sites._rows import give_back
from gossamer.sites._walk import Target, blocks_of, text_config

Batch = Mapping[str, Tensor]
Visit = Callable[[Target, list[Stats]], None]


class _Stop(BaseException):
    """Ends a forward pass once the block in hand has put out its result."""


class Calibration:
    """The state of one walk: the inputs of each lane, and what each lane put out of the last finished block.

    Args:
        model: a transformers model with one stack of blocks.
        batches: keyword arguments of the model, one mapping a lane.
        gram: gather Gram matrices, not only norms.
        device: where a block goes while it is worked on; None leaves the model where it is.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], *, gram: bool, device: torch.device | None = None) -> None:
        self.model, self.batches, self.gram, self.device = model, batches, gram, device
        self.name, self.blocks = blocks_of(model)
        self.outputs: list[Any] = [None] * len(batches)
        self._lane = 0  # the lane whose turn it is

    def block(self, index: int, targets: Sequence[Target], visit: Visit) -> None:
        """Take all lanes through one block; ``visit`` gets each target with the statistics of its input, once.

        A stacked expert weight comes with one `Stats` an expert, of the tokens routed to it.
        """
        by_module: dict[nn.Module, list[Target]] = {}
        for target in targets:
            by_module.setdefault(target.module, []).append(target)
        gatherer = _Gatherer(by_module, self.gram)
        order = {module: position for position, module in enumerate(by_module)}

        def deal_with(module: object) -> None:
            assert isinstance(module, nn.Module)
            for target in by_module[module]:
                visit(target, gatherer.take(target))
            give_back()

        with ExitStack() as stack:
            for done in self.blocks[:index]:
                stack.enter_context(forwarding(done, lambda *_, **__: self.outputs[self._lane]))
            stack.enter_context(_eager_experts(self.model))
            here = self.blocks[index]
            home = next((p.device for p in here.parameters()), torch.device("cpu"))
            if self.device is not None:
                here.to(self.device)
                stack.callback(here.to, home)
                stack.enter_context(hooked(here.register_forward_pre_hook(self._bring, with_kwargs=True)))
            stack.enter_context(hooked(here.register_forward_hook(lambda _m, _a, out: self._finish(out, home))))
            for module in by_module:
                stack.enter_context(hooked(module.register_forward_pre_hook(lambda m, args: self._arrive(gatherer, m, args))))
            self._lanes: dict[int, Lane] = {}
            lockstep([self._body(i) for i in range(len(self.batches))], lambda m: order[m], deal_with)  # type: ignore[index]
            for module in by_module:
                if module not in gatherer.seen:  # no token came this way: an expert kept in a module of its own
                    deal_with(module)
        give_back()

    def _body(self, index: int) -> Callable[[Lane], None]:
        def run(lane: Lane) -> None:
            self._lanes[index], self._lane = lane, index
            try:
                self.model(**self.batches[index], use_cache=False)
            except _Stop:
                return
            raise GossamerError(f"the forward pass of {type(self.model).__name__} never came to the block in {self.name}")

        return run

    def _arrive(self, gatherer: "_Gatherer", module: nn.Module, args: tuple[Any, ...]) -> None:
        index = self._lane
        gatherer.add(index, module, args)
        self._lanes[index].pause(module)
        self._lane = index

    def _bring(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _to(args, self.device), _to(kwargs, self.device)

    def _finish(self, output: Any, home: torch.device) -> None:
        self.outputs[self._lane] = _to(output, home) if self.device is not None else output
        raise _Stop


class _Gatherer:
    """Statistics of the inputs that come to the modules of one block; those that share an input share its `Stats`."""

    def __init__(self, by_module: Mapping[nn.Module, Sequence[Target]], gram: bool) -> None:
        self.by_module, self.gram = by_module, gram
        self.seen: dict[nn.Module, Stats] = {}
        self._experts: dict[str, list[Stats]] = {}
        self._last: dict[int, tuple[Tensor, int, Stats]] = {}  # lane → its last input and where that went

    def add(self, lane: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if any(target.stacked for target in self.by_module[module]):
            self.seen[module] = self.seen.get(module) or Stats(1)
            with _Observed(self._sinks(module, x.device)):
                module.forward(*args)
            return
        last = self._last.get(lane)
        if last is not None and last[0] is x and last[1] == x._version:  # q, k and v; gate and up
            self.seen[module] = last[2]
            return
        if module not in self.seen:
            self.seen[module] = Stats(x.shape[-1], gram=self.gram, device=x.device)
        self.seen[module].add(x)
        self._last[lane] = (x, x._version, self.seen[module])

    def _sinks(self, module: nn.Module, device: torch.device) -> list[tuple[Target, list[Stats]]]:
        sinks = []
        for target in self.by_module[module]:
            experts, _, width = target.matrices().shape
            if target.name not in self._experts:
                self._experts[target.name] = [Stats(width, gram=self.gram, device=device) for _ in range(experts)]
            sinks.append((target, self._experts[target.name]))
        return sinks

    def take(self, target: Target) -> list[Stats]:
        """Return the statistics for a target, one for each of its matrices; white ones where no token came."""
        count, _, width = target.matrices().shape
        device = target.parameter.device
        if target.stacked:
            found = self._experts.pop(target.name)
            if not any(stats.tokens for stats in found):
                raise GossamerError(
                    f"{target.name}: no product with these stacked weights was seen, so they cannot be calibrated"
                )
        else:
            found = [self.seen[target.module]] if target.module in self.seen else [Stats(width)] * count
        return [stats if stats.tokens else Stats.unseen(width, device=device) for stats in found]


class _Observed(TorchFunctionMode):
    """Sees every product with one matrix of a stacked weight, and adds its other factor to that expert's statistics."""

    def __init__(self, sinks: Sequence[tuple[Target, list[Stats]]]) -> None:
        super().__init__()
        self.sinks = {target.parameter.untyped_storage().data_ptr(): (target, stats) for target, stats in sinks}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor) and args[1].ndim == 2:
            target, stats = self.sinks.get(args[1].untyped_storage().data_ptr(), (None, None))
            if target is not None and stats is not None and func in _PRODUCTS:
                stack = target.parameter
                stats[(args[1].storage_offset() - stack.storage_offset()) // stack.stride(0)].add(args[0])
        return func(*args, **(kwargs or {}))


_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


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
def _eager_experts(model: nn.Module) -> Iterator[None]:
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


def _to(value: Any, device: torch.device | None) -> Any:
    """Move the tensors of nested tuples, lists and dicts to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value
