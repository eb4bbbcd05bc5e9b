"""A model as a method of structure sees it: its blocks, the groups in them, and calibration that goes through them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.stats import INPUTS, Stats
from gossamer.core.structure import Divergence, Group, Linear, Once, Parameters, Skeleton, Solve, Step, Structure
from gossamer.sites._calibrate import Batch, Calibration, Call
from gossamer.sites._coupling import Coupling, couplings, is_transposed
from gossamer.sites._divergence import Moved
from gossamer.sites._gradients import gradients
from gossamer.sites._hidden import Hidden
from gossamer.sites._low_rank import LowRank
from gossamer.sites._walk import Target, blocks_of, targets
from gossamer.sites._widths import adopt, built, difference, narrower, renumber, widths_of
from gossamer.sites.weights import bar


class ModelSkeleton(Skeleton):
    """A model as a method sees it."""

    def __init__(
        self,
        model: Any,
        how: Structure,
        batches: Sequence[Batch],
        device: torch.device | None,
        progress: bool | None,
        once: Once | None = None,
    ) -> None:
        self.model, self.how, self.batches, self.device, self.progress = model, how, batches, device, progress
        self.once = once or _now
        self.list = blocks_of(model)[1]
        self.budget = Parameters(self.parameters)
        self.rows: list[dict[str, Any]] = [{"block": index} for index in range(len(self.list))]

    @property
    def blocks(self) -> int:
        return len(self.list)

    @property
    def parameters(self) -> int:
        return count(self.model)["inside"]

    def groups(self, kind: str) -> list[Group]:
        return [coupling.group() for coupling in couplings(self.model, self.list, kind)]

    def walk(self, *kinds: str, solve: Solve | None = None) -> Iterator[Step]:
        walk = Calibration(self.model, self.batches, self.how.needs & INPUTS, device=self.device)
        found = {kind: couplings(self.model, self.list, kind) for kind in kinds}
        inputs = [_states(call) for call in walk.calls(0, walk.blocks[0], answered=False)]
        with bar(self.blocks, str(self.how), self.progress) as shown:
            for index in range(self.blocks):
                here = [by_block[index] for by_block in found.values()]
                by_module = {coupling.out: coupling for coupling in here}
                stats: dict[str, Stats] = {}

                def visit(target: Target, known: list[Stats], by_module: Any = by_module, stats: Any = stats) -> None:
                    coupling = by_module[target.module]
                    stats[coupling.kind] = known[0]
                    if solve is not None:
                        solve(coupling.group(), known[0])

                walk.block(index, [_target(coupling) for coupling in here], visit)
                outputs = [out[0] if isinstance(out, tuple) else out for out in walk.outputs]
                if not all(bool(x.isfinite().all()) for x in outputs):
                    raise ArithmeticError(f"the hidden states that block {index} puts out hold NaN or infinities")
                yield Step(index, inputs, outputs, stats)
                stats.clear()  # whoever still holds the step holds no matrices of it
                inputs = outputs
                shown.update()

    def gradients(self, *kinds: str) -> Iterator[tuple[Group, Group]]:
        found = [coupling for kind in kinds for coupling in couplings(self.model, self.list, kind)]
        named = [[f"{c.kind} {c.block} {place}" for place in range(len(c.parts))] for c in found]
        targets = [
            Target(name, part.module, "weight", c.block)
            for c, names in zip(found, named, strict=True)
            for name, part in zip(names, c.parts, strict=True)
        ]
        known = gradients(self.model, self.batches, targets)
        for coupling, names in zip(found, named, strict=True):
            yield coupling.group(), coupling.group([known.pop(name) for name in names])

    def divergence(self) -> Divergence:
        return Moved(self.model, self.batches)

    def keep(self, group: Group, members: Tensor) -> None:
        row = self.rows[group.block]
        first = row.get(group.kind, [group.count])[0]  # a method in rounds comes here several times
        row[group.kind] = [first, len(members)]
        if len(members) < group.count:
            couplings(self.model, self.list, group.kind)[group.block].keep(members)

    def drop(self, blocks: Sequence[int]) -> None:
        left = [index for index in range(self.blocks) if index not in set(blocks)]
        config = _shorter(self.model.config, self.blocks, left)
        widths = {kind: [sizes[i] for i in left] for kind, sizes in widths_of(self.model).items()}
        if told := difference(built(type(self.model), config, widths), self.model, left):
            name = type(self.model).__name__
            raise GossamerError(f"{name} without blocks {list(blocks)} is no model that can be built: {told}")
        for index in sorted(blocks, reverse=True):
            self.rows[index]["dropped"] = True
            del self.list[index]
        adopt(self.model, config)
        renumber(self.model)
        if widths:
            from gossamer.hf import shaped

            shaped(self.model, widths)

    @cached_property
    def _hidden(self) -> Hidden:
        return Hidden.of(self.model, self.batches[0])

    @property
    def width(self) -> int:
        return self._hidden.width

    def check_width(self, width: int) -> None:
        narrower(self.model, width)

    def project(self, q: Tensor) -> None:
        config = narrower(self.model, q.shape[1])
        self._hidden.project(self.model, q)
        adopt(self.model, config)

    def linears(self) -> list[Linear]:
        name, (prefix, blocks) = type(self.model).__name__, blocks_of(self.model)
        found: list[Linear] = []
        for target in targets(self.model):
            if target.stacked:
                raise GossamerError(f"{target.name} is a stack of experts, which has no place for the factors of each")
            assert target.block is not None  # as all are by default
            at = target.name.removeprefix(f"{prefix}.{target.block}.").removesuffix(".weight")
            found.append(Linear(at, target.block, target.matrices()[0]))
        if any(isinstance(module, LowRank) for module in blocks.modules()):
            raise GossamerError(f"{name} holds products of two matrices already")
        by_block = [{linear.name for linear in found if linear.block == index} for index in range(len(blocks))]
        if any(names != by_block[0] for names in by_block):
            raise GossamerError(f"{name}: its blocks have other linears each, so their ranks cannot be listed")
        return found

    def factor(self, linear: Linear, outer: Tensor, inner: Tensor) -> None:
        block = self.list[linear.block]
        block.set_submodule(linear.name, LowRank.of(block.get_submodule(linear.name), outer, inner))
        self.rows[linear.block][linear.name] = [linear.rank, outer.shape[1]]

    def note(self, block: int, **values: Any) -> None:
        self.rows[block].update(values)


def _now(step: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return compute()


def _shorter(config: Any, depth: int, left: Sequence[int]) -> Any:
    """Return a configuration of these blocks only; its lists of one value a block are cut along."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if "layer" in name and isinstance(value, list | tuple) and value:
            if len(value) != depth:
                raise GossamerError(f"config.{name} = {value} names blocks in a way that cannot be cut")
            setattr(text, name, type(value)(value[i] for i in left))
    text.num_hidden_layers = len(left)
    return config


@torch.no_grad()
def try_out(skeleton: ModelSkeleton, found: Sequence[Coupling]) -> None:
    """Remove a member of the first block in a copy, and compare with one whose columns are zero: the table is right for it."""
    walk = Calibration(skeleton.model, skeleton.batches[:1], frozenset(), device=skeleton.device)
    block = walk.blocks[0]
    call: Call = walk.calls(0, block, answered=False)[0]

    def answer(coupling: Coupling, gone: int, cut: bool) -> Tensor:
        """Return what the block puts out with the columns of its first members zero, and the first one cut or not."""
        twin = copy.deepcopy(block)
        (own,) = couplings(skeleton.model, [twin], coupling.kind)
        own.group().out[:, : gone * own.group().width] = 0
        if cut:
            own.keep(torch.arange(1, own.count))
        out = twin(*call.args, **call.kwargs)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states.double()

    for coupling in found:
        if coupling.count < 2:  # as another run has left it
            continue
        whole, nothing = answer(coupling, 1, False), answer(coupling, coupling.count, False)
        try:
            off = float((answer(coupling, 1, True) - whole).abs().max())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise GossamerError(_untrue(skeleton.model, coupling, " ".join(str(error).split())[:160])) from error
        moved = float((whole - nothing).abs().max())  # what the members do at all
        if not off <= 16 * torch.finfo(coupling.out.weight.dtype).eps * (moved + float(whole.abs().max())):
            raise GossamerError(_untrue(skeleton.model, coupling, f"its outputs are off by {off:.3g}, of {moved:.3g}"))


def _untrue(model: nn.Module, coupling: Coupling, told: str) -> str:
    return f"{type(model).__name__} does not work with fewer {coupling.kind} than its configuration says: {told}"


def _target(coupling: Coupling) -> Target:
    return Target(coupling.kind, coupling.out, "weight", coupling.block, transposed=is_transposed(coupling.out))


def _states(call: Call) -> Tensor:
    states: Tensor = (*call.args, call.kwargs.get("hidden_states"))[0]
    return states


def count(model: nn.Module) -> dict[str, int]:
    """Count parameters (tied ones once), those in the blocks, and blocks."""
    blocks = blocks_of(model)[1]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "inside": sum(p.numel() for p in blocks.parameters()),
        "blocks": len(blocks),
    }
