"""Every target once, with the statistics that are wanted of it."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from gossamer.core.stats import INPUTS, Stats
from gossamer.sites._calibrate import Batch, Calibration, Visit
from gossamer.sites._gradients import gradients
from gossamer.sites._pruning import Pruning
from gossamer.sites._walk import Target
from gossamer.sites._whole import Whole, fill, measured


def visit_all(
    model: nn.Module,
    gather: frozenset[str],
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    visit: Visit,
    pruning: Pruning | None = None,
    progress: bool | None = False,
) -> None:
    """Hand over every target once with the statistics named in ``gather``, block by block where these come from inputs."""
    whole = measured(model, gather, batches, chosen, progress)
    if gather & INPUTS:
        walk = Calibration(model, batches, gather, device=device)
        for index in range(len(walk.blocks)):
            inside = [target for target in chosen if target.block == index]
            known = whole | own_gradients(model, gather, batches, inside)
            with pruning.block(walk, index, inside) if pruning else nullcontext(inside) as visited:
                walk.block(index, visited, lambda target, stats: visit(target, fill(target, stats, known)))  # noqa: B023
        return
    for block in dict.fromkeys(target.block for target in chosen):
        inside = [target for target in chosen if target.block == block]
        known = whole | own_gradients(model, gather, batches, inside)
        for target in inside:
            visit(target, blank_stats(target, known))


def own_gradients(model: nn.Module, gather: frozenset[str], batches: Sequence[Batch], inside: Sequence[Target]) -> Whole:
    """Return each window's gradients of some targets, where they are gathered: large, so those of one block at a time."""
    return {"grads": gradients(model, batches, inside, each=True)} if "grads" in gather and inside else {}


def blank_stats(target: Target, whole: Whole) -> list[Stats]:
    """Return statistics without inputs, one for each matrix of the target, holding what was measured on the whole model."""
    count, _, width = target.matrices().shape
    return fill(target, [Stats(width, device=target.parameter.device) for _ in range(count)], whole)
