"""Statistics of what comes to the weights of one block, gathered while the model's own forward runs through it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.core.errors import GossamerError
from gossamer.core.stats import Stats
from gossamer.sites._walk import Target


class Gatherer:
    """Statistics of the inputs that come to the modules of one block; those that share an input share its `Stats`."""

    def __init__(self, by_module: Mapping[nn.Module, Sequence[Target]], needs: frozenset[str]) -> None:
        self.by_module = by_module
        self.needs = needs
        self.seen: dict[nn.Module, Stats] = {}
        self._experts: dict[str, list[Stats]] = {}
        self._dense: dict[int, tuple[nn.Module, Tensor]] = {}  # lane → where its dense twin stands, and the input there
        self._rows: dict[int, int] = {}  # lane → how many rows its first input had, which are all of its tokens
        self._last: dict[int, tuple[Tensor, int, Stats]] = {}  # lane → its last input and where that went

    def blank(self, width: int, device: torch.device) -> Stats:
        """Return empty statistics of what is needed."""
        empty = partial(Stats, width, gram="gram" in self.needs, mean="mean" in self.needs, device=device)
        stats = empty()
        if "dense" in self.needs:
            stats.dense = empty()
        return stats

    def add_dense(self, lane: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take down what the dense model puts into a module, before the lane itself comes to it."""
        self._dense[lane] = module, args[0]

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
            self.seen[module] = self.blank(x.shape[-1], x.device)
        known, dense = self.seen[module], self._same_tokens(lane, module, x)
        known.add(x, dense if "cross" in self.needs else None)
        if known.dense is not None and dense is not None:
            known.dense.add(dense)
        self._last[lane] = (x, x._version, self.seen[module])

    def _same_tokens(self, lane: int, module: nn.Module, x: Tensor) -> Tensor | None:
        """Return the dense model's input to a module if its rows are those of x: every token of the lane."""
        rows = x.numel() // x.shape[-1]
        at, dense = self._dense.get(lane, (None, None))
        everything = rows == self._rows.setdefault(lane, rows)
        return dense if at is module and everything and dense is not None and dense.shape == x.shape else None

    def _sinks(self, module: nn.Module, device: torch.device) -> list[tuple[Target, list[Stats]]]:
        sinks = []
        for target in self.by_module[module]:
            experts, _, width = target.matrices().shape
            if target.name not in self._experts:
                self._experts[target.name] = [self.blank(width, device) for _ in range(experts)]
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
