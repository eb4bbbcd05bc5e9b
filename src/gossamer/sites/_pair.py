"""A pruned model and its dense teacher, taken through the same windows block by block: the one learns from the other."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.grid import found, held, tiles
from gossamer.sites._calibrate import Batch, Calibration, Call, eager_experts, moved
from gossamer.sites._inputs import check_batches
from gossamer.sites._job import check_finite
from gossamer.sites._refit import Example, Grid, hidden, refit
from gossamer.sites._rows import give_back
from gossamer.sites._walk import Target, blocks_of
from gossamer.sites._walk import targets as find_targets
from gossamer.sites.distilling import check_teacher

HELD = 8  # one batch of so many is not trained on, but judged by


class How(Protocol):
    """What is asked for: see `gossamer.sites.reconstructing.Reconstruct`."""

    @property
    def epochs(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def inputs(self) -> str: ...
    @property
    def parts(self) -> str: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def grid(self) -> Grid | None: ...


class Pair:
    """Both walks, and what is refit of each block.

    Args:
        masks: of the pruned weights, True = kept.
        device: where one block of each model is worked on; None: where the models are.
    """

    def __init__(
        self,
        how: How,
        model: nn.Module,
        teacher: nn.Module,
        batches: Sequence[Batch],
        masks: Mapping[Target, Tensor],
        device: torch.device | None,
    ) -> None:
        self.how, self.masks, self.batches, self.device = how, masks, batches, device
        self.kept = Calibration(model, batches, frozenset(), device=device)
        place = next(teacher.parameters()).device
        offloaded = any(p.is_meta for p in teacher.parameters())  # accelerate moves it
        inputs = batches if place.type == "meta" else [moved(dict(batch), place) for batch in batches]
        self.dense = Calibration(teacher, inputs, frozenset(), device=None if offloaded else device)
        self.name, self.blocks = self.kept.name, self.kept.blocks
        self.end = 1 + max(target.block for target in masks if target.block is not None)  # behind it nothing is pruned
        self._answers: list[Call] = []  # of the dense block in work, where all of it was asked
        self.held = max(len(batches) // HELD, 1)

    def steps(self, start_at: int) -> int:
        """Return how many steps there are from a block on."""
        parts = sum(len(self.parts(index)) for index in range(start_at, self.end))
        return parts * self.how.epochs * (len(self.batches) - self.held)

    def parts(self, index: int) -> list[str]:
        """Return what is refit in a block, by its name there; "" is the block itself. Nothing where it has no zeros."""
        modules = {target.module for target in self.masks if target.block == index}
        if self.how.parts == "block":
            return [""] if modules else []
        return [name for name, child in self.blocks[index].named_children() if not modules.isdisjoint(child.modules())]

    def refit(self, index: int, generator: torch.Generator, tell: Callable[[float], None]) -> list[dict[str, Any]]:
        """Refit the parts of a block one after the other, and return a row for each."""
        rows = []
        for part in self.parts(index):
            started = time.perf_counter()
            name = f"{self.name}.{index}" + (f".{part}" if part else "")
            module = self.blocks[index].get_submodule(part)
            examples = self._examples(index, part)
            try:
                with eager_experts(self.kept.model):
                    told = refit(
                        module,
                        self._masks(index, module),
                        examples[: -self.held],
                        examples[-self.held :],
                        epochs=self.how.epochs,
                        rate=self.how.rate,
                        rank=self.how.rank,
                        generator=generator,
                        device=self.device or next(module.parameters()).device,
                        tell=tell,
                        grid=self.how.grid,
                        turned=set(self._names(index, module, transposed=True)),
                    )
            except GossamerError as error:
                raise GossamerError(f"{name}: {error}") from error
            rows.append({"name": name, "block": index, **told, "seconds": time.perf_counter() - started})
            give_back()
        return rows

    def go_on(self, index: int) -> None:
        """Take both models' windows through a block; the next one is entered with what it put out."""
        answers = self._answers or self.dense.calls(index, self.dense.blocks[index])
        self.dense.outputs, self._answers = [call.output for call in answers], []
        if self.how.inputs == "pruned":
            self.kept.outputs = [call.output for call in self.kept.calls(index, self.blocks[index])]

    def _examples(self, index: int, part: str) -> list[Example]:
        answers = self.dense.calls(index, self.dense.blocks[index].get_submodule(part))
        if not part:
            self._answers = answers
        calls = answers
        if self.how.inputs == "pruned":
            calls = self.kept.calls(index, self.blocks[index].get_submodule(part), answered=False)
        examples = []
        for call, answer, batch in zip(calls, answers, self.batches, strict=True):
            attended = batch.get("attention_mask")
            states = hidden(answer.output)
            fits = attended is not None and attended.shape == states.shape[:2]
            examples.append(Example(call, states, attended.bool() if fits else None))  # type: ignore[union-attr]
        return examples

    def _masks(self, index: int, module: nn.Module) -> dict[str, Tensor]:
        return {name: self.masks[target] for name, target in self._names(index, module).items()}

    def _names(self, index: int, module: nn.Module, *, transposed: bool = False) -> dict[str, Target]:
        """Return the pruned weights of a part of a block by their names in it; the ``transposed`` ones only, if told so."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        own = {t: names.get(id(getattr(t.module, t.attribute))) for t in self.masks if t.block == index}
        return {name: t for t, name in own.items() if name is not None and (t.transposed or not transposed)}


def check(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], expression: str | None, grid: Grid | None = None
) -> dict[Target, Tensor]:
    """Return the masks of the pruned weights, and raise for everything that can be wrong, before anything is changed."""
    check_teacher(model, teacher)
    if len(blocks_of(model)[1]) != len(blocks_of(teacher)[1]):
        raise GossamerError("student and teacher have different numbers of blocks")
    chosen = [target for target in find_targets(model, expression) if target.block is not None]
    if offloaded := [target.name for target in chosen if target.parameter.is_meta]:
        raise GossamerError(
            f"{len(offloaded)} weights are offloaded ({offloaded[0]} ...): load the model whole; device= moves blocks"
        )
    for target in [*chosen, *(t for t in find_targets(teacher) if not t.parameter.is_meta)]:
        check_finite(target)
    masks = {target: target.kept(grid and grid.group) for target in chosen}
    if all(bool(mask.all()) for mask in masks.values()):
        raise GossamerError(f"none of the {len(chosen)} weights has zeros: prune the model first, with gossamer.prune")
    if len(batches) < 2:
        raise GossamerError(
            "reconstruct wants at least 2 batches, one of them to judge by: give more windows, or a smaller batch"
        )
    check_batches(model, batches)
    if grid is not None:  # a weight without zeros is rounded too
        return {target: mask if _on_grid(target, grid) else mask & (target.parameter != 0) for target, mask in masks.items()}
    return {target: mask for target, mask in masks.items() if not mask.all()}


def _on_grid(target: Target, grid: Grid) -> bool:
    """Whether a weight has been rounded to grids already, where 0 is a value as any other: elsewhere its zeros are pruned."""
    w = target.parameter.detach()
    groups = tiles(w.mT if target.transposed else w, 1, grid.group).flatten(0, -2)
    return bool(found(groups.to(held(w)), grid.bits)[3].all())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while: dropout would blur what is fitted."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
