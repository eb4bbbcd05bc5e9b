"""What a pass takes by how many members the blocks have left: a table measured on the device where the model will run."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import GossamerError
from gossamer.core.structure import Budget, Group
from gossamer.sites._calibrate import Calibration
from gossamer.sites._coupling import Coupling, couplings
from gossamer.sites._walk import blocks_of
from gossamer.sites.weights import bar
from gossamer.timing import ROTATE_BYTES, seconds

SHARES = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]  # of the members; between them the table is a straight line
ROUNDS = 3


@dataclass(frozen=True)
class Latency(Budget):
    """A budget of seconds.

    Attributes:
        total: a whole pass, head included.
        blocks: by kind of group, what one block takes with so many members left and all others whole; fewest members first.
    """

    total: float
    blocks: Mapping[str, Sequence[tuple[int, float]]]

    def cost(self, group: Group, left: int) -> float:
        table = self.blocks[group.kind]
        if left == table[-1][0]:
            return table[-1][1]
        for (n, low), (m, high) in pairwise(table):
            if n <= left <= m:
                return low + (high - low) * (left - n) / (m - n)
        raise GossamerError(f"block {group.block} has {left} {group.kind}, and the table ends before that")

    def says(self, fraction: float) -> str:
        return f"a speed-up of {1 / (1 - fraction):.2f}"


@torch.no_grad()
def measure(model: Any, kinds: Sequence[str], at: tuple[int, int], progress: bool | None) -> Latency:
    """Time a pass of (batch, tokens), and copies of the first block with fewer and fewer members.

    Copies are as many as it takes to find their weights in memory, as in a whole model, and each number of members is timed in
    turn with the whole block: what the machine does meanwhile happens to both.

    Raises:
        GossamerError: the blocks are not alike.
    """
    blocks = blocks_of(model)[1]
    found = {kind: couplings(model, blocks, kind) for kind in kinds}
    for kind, here in found.items():
        if len({coupling.count for coupling in here}) > 1:
            raise GossamerError(f"the blocks of this model differ in their {kind}: one table of times does not hold for all")
    batch = {"input_ids": torch.zeros(at, dtype=torch.long, device=next(model.parameters()).device)}
    walk = Calibration(model, [batch], frozenset())
    call = walk.calls(0, blocks[0], answered=False)[0]
    device = batch["input_ids"].device
    turns = max(2, -(-ROTATE_BYTES.get(device.type, 1 << 28) // sum(p.nbytes for p in blocks[0].parameters())))
    turns = min(turns, max(len(blocks), 2))

    def timed(copies: Sequence[nn.Module]) -> float:
        return seconds(lambda i: copies[i](*call.args, **call.kwargs), device, len(copies))

    total = whole_pass(model, at)
    dense = [copy.deepcopy(blocks[0]) for _ in range(turns)]
    steps = {kind: _steps(here[0].count) for kind, here in found.items()}
    ratios: dict[str, list[tuple[int, float]]] = {}
    wholes: list[float] = []
    with bar(sum(map(len, steps.values())), "times", progress) as shown:
        for kind, numbers in steps.items():
            ratios[kind] = []
            for n in numbers:
                fewer = [_cut(copy.deepcopy(blocks[0]), found[kind][0], model, n) for _ in range(turns)]
                pairs = [(timed(dense), timed(fewer)) for _ in range(ROUNDS)]
                wholes += [whole for whole, _ in pairs]
                ratios[kind].append((n, sorted(own / whole for whole, own in pairs)[ROUNDS // 2]))
                shown.update()
    block = sorted(wholes)[len(wholes) // 2]
    return Latency(total, {kind: _rising([(n, ratio * block) for n, ratio in own]) for kind, own in ratios.items()})


@torch.no_grad()
def whole_pass(model: Any, at: tuple[int, int]) -> float:
    """Return the median seconds of a pass of (batch, tokens) without a cache."""
    tokens = torch.zeros(at, dtype=torch.long, device=next(model.parameters()).device)
    return seconds(lambda _: model(input_ids=tokens, use_cache=False), tokens.device, 1)


def _steps(count: int) -> list[int]:
    """Return the numbers of members that are timed, most first; larger ones in multiples of eight."""
    unit = 8 if count >= 128 else 1
    return sorted({max(round(share * count / unit) * unit, 1) for share in SHARES} | {count}, reverse=True)


def _cut(block: nn.Module, like: Coupling, model: Any, left: int) -> nn.Module:
    (own,) = couplings(model, [block], like.kind)
    if left < own.count:
        own.keep(torch.arange(left))
    return block


def _rising(found: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the table, fewest members first; fewer never take longer, for what seems so is the clock's error or no reason."""
    best, table = float("inf"), []
    for n, taken in found:
        best = min(best, taken)
        table.append((n, best))
    return table[::-1]
