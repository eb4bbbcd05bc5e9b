"""Evolved: sparsities traded between weights of one size, by what the whole model says with each choice."""

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from gossamer.core.allocate._declared import needs
from gossamer.core.errors import GossamerError
from gossamer.core.evolution import check_stages, evolve, swapped
from gossamer.core.pattern import check_sparsity


class Trial(Protocol):
    """The model with every tensor pruned to one of several sparsities."""

    def take(self, levels: Sequence[int]) -> None:
        """Put each tensor in at the sparsity of its level."""

    def __call__(self, draw: int, tokens: int) -> float:
        """Return how far what the model says is from what the dense one says, on so many tokens that ``draw`` chooses."""


class Trials(Protocol):
    """What makes them."""

    def allows(self, sparsity: float) -> bool:
        """Whether a tensor can be pruned to this."""

    def __call__(self, grid: Sequence[float]) -> AbstractContextManager[Trial]:
        """Prune all tensors to each of these sparsities; while it lasts, one of each is in the model."""


@needs("trials")
def evolved(
    tensors: Mapping[str, Tensor],
    sparsity: float,
    trials: Trials,
    *,
    levels: int = 4,
    interval: float = 0.05,
    generations: int = 10,
    offspring: int = 16,
    survivors: tuple[int, ...] = (4, 1),
    tokens: tuple[int, ...] = (512, 4096),
    seed: int = 0,
) -> dict[str, float]:
    """Search s_i = S + k_i·interval by KL(dense‖pruned) at one total (the evolution of Týr: Li et al., 2025, arXiv:2503.09657).

    The method itself prunes every tensor of the dense model to 2·levels + 1 sparsities around S. Then evolution: a child is its
    parent with one to four swaps, each a level more for a tensor and one less for another of the same size, so that the total
    stays; children are thinned out by KL on more and more tokens, the parent is there at the last, and what is left is the next
    parent. The first parent is uniform; each one is no worse than the one before on that generation's tokens.

    Where `searched` adds up what each layer does to its own output, this asks the whole model.

    Args:
        tensors: the weights; they are moved and put back.
        sparsity: fraction of zeros over all tensors, S in [0, 1).
        trials: prunes all tensors to some sparsities, and measures choices of them.
        levels: how many sparsities on either side, as far as these are in [0, 1).
        interval: how far these are apart; with a pattern n:m take 1/m. It is halved until there is one on either side.
        generations, offspring, survivors, tokens: as in `Tyr`.
        seed: of the swaps and of the tokens.

    Týr prunes structures, in rounds of which each looks half as far; here it is one, for any method and pattern. The pruned
    weights are on disk meanwhile, in float32: all tensors 2·levels + 2 times.

    Raises:
        GossamerError: a hyper-parameter makes no sense, or the pattern can take no sparsity beside S on either side.
    """
    sparsity = check_sparsity(sparsity)
    check_stages(survivors, tokens, (levels, generations, offspring), "evolved")
    if not isinstance(interval, int | float) or not 0 < interval < 1:
        raise GossamerError(f"evolved wants an interval in (0, 1); got {interval!r}")
    names = [name for name, tensor in tensors.items() if tensor.numel()]
    found = dict.fromkeys(tensors, sparsity)
    sizes = [tensors[name].numel() for name in names]
    if sparsity == 0 or len(set(sizes)) == len(sizes):
        return found  # nothing to trade
    for apart in (interval / 2**k for k in range(10)):
        steps = [k for k in range(-levels, levels + 1) if k == 0 or trials.allows(sparsity + k * apart)]
        if steps[0] < 0 < steps[-1]:
            break
    else:
        raise GossamerError(
            f"evolved(interval={interval:g}) finds no sparsity that can be taken on both sides of {sparsity:g}: take another, "
            "1/m with a pattern n:m"
        )
    grid = [max(sparsity + k * apart, 0.0) for k in steps]
    chance, choices = random.Random(seed), [list(range(len(steps)))] * len(names)
    with trials(grid) as trial:
        picked, _ = evolve(
            [steps.index(0)] * len(names),
            lambda parent: swapped(sizes, choices, parent, chance),
            trial.take,
            trial,
            chance,
            generations=generations,
            offspring=offspring,
            survivors=survivors,
            tokens=tokens,
        )
    return found | {name: grid[level] for name, level in zip(names, picked, strict=True)}
