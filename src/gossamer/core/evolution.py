"""Evolution: levels traded between things that are alike, by how far the whole model moves (the search of Týr)."""

import math
import random
from collections.abc import Callable, Hashable, Sequence

from gossamer.core.errors import GossamerError
from gossamer.core.structure import Divergence

Levels = list[int]


def check_stages(survivors: Sequence[int], tokens: Sequence[int], counts: Sequence[int], what: str) -> None:
    """Raise unless every count is 1 or more, and there are as many survivors as tokens, the last of them one."""
    lists = all(isinstance(given, Sequence) and not isinstance(given, str) for given in (survivors, tokens))
    if not lists or not all(type(n) is int for n in [*counts, *survivors, *tokens]):
        raise GossamerError(f"{what}: counts are integers, survivors and tokens several of them: survivors=(4, 1)")
    stages = len(survivors) == len(tokens) > 0 and survivors[-1] == 1
    if min([*counts, *survivors, *tokens]) < 1 or not stages:
        raise GossamerError(f"{what}: counts are 1 or more, survivors as many as tokens, the last of them 1")


def swapped(alike: Sequence[Hashable], choices: Sequence[Sequence[int]], parent: Levels, chance: random.Random) -> Levels:
    """Return a parent with one to four swaps: one thing goes a level up, and another that is alike as much down.

    Args:
        alike: what is equal of things that may trade; their total stays.
        choices: of each thing, its levels, ascending.
    """
    child = list(parent)
    for _ in range(min(chance.randint(1, 4), chance.randint(1, 4))):
        more = [i for i, n in enumerate(child) if n < choices[i][-1]]
        if not more:
            break
        up = chance.choice(more)
        gain = choices[up][choices[up].index(child[up]) + 1] - child[up]
        if others := [i for i, n in enumerate(child) if i != up and alike[i] == alike[up] and n - gain in choices[i]]:
            down = chance.choice(others)
            child[up], child[down] = child[up] + gain, child[down] - gain
    return child


def evolve(
    parent: Levels,
    swap: Callable[[Levels], Levels],
    take: Callable[[Levels], None],
    measure: Divergence,
    chance: random.Random,
    *,
    generations: int,
    offspring: int,
    survivors: Sequence[int],
    tokens: Sequence[int],
) -> tuple[Levels, float]:
    """Return the levels that generations of swaps end with, and their divergence on the last stage's tokens.

    Each generation's children are thinned out in stages: so many survive of a measurement on so many tokens, the same ones for
    all of them. The parent is there at the last stage, and the one that is left is the next parent.

    Args:
        swap: makes a child of a parent.
        take: puts levels into the model.
        measure: how far the model is then from the dense one.

    Raises:
        ArithmeticError: every model that was tried diverges by NaN or infinity.

    Source: Li et al., Týr-the-Pruner, 2025, arXiv:2503.09657.
    """
    apart = float("nan")
    for _ in range(generations):
        brood: list[Levels] = []
        for _ in range(8 * offspring):  # there may be fewer that differ than were asked for
            child = swap(parent)
            if child != parent and child not in brood:
                brood.append(child)
            if len(brood) == offspring:
                break
        for stage, (left, seen) in enumerate(zip(survivors, tokens, strict=True), 1):
            brood += [parent] if stage == len(tokens) else []
            draw = chance.getrandbits(32)  # the same tokens for all of them
            told = []
            for child in brood:
                take(child)
                apart = measure(draw, seen)
                told.append(apart if math.isfinite(apart) else math.inf)
            if told and min(told) == math.inf:
                raise ArithmeticError("the divergence of every model that was tried is NaN or infinite")
            best = sorted(range(len(brood)), key=told.__getitem__)[:left]
            brood, apart = [brood[place] for place in best], told[best[0]] if best else apart
        parent = brood[0]
    return parent, apart
