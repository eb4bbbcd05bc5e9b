"""Input channels in another order, so that n:m keeps more; what puts them out is reordered too, and the function is the same.

Which channels may be reordered is proposed by the coupling table and decided by a trial: a weight whose output is another with
them shuffled (a gate or a norm stands between) is left alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer import scores, solvers
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM
from gossamer.core.permute import search
from gossamer.core.stats import Stats
from gossamer.sites._calibrate import Calibration
from gossamer.sites._coupling import Part, couplings
from gossamer.sites._job import Job
from gossamer.sites._refit import hidden
from gossamer.sites._walk import Target


@dataclass(frozen=True, eq=False)
class Channels:
    """The inputs of a weight that may be reordered: ``heads`` sets of ``size`` channels, each read ``readers`` times.

    Attributes:
        target: the weight, whose inputs are (heads, readers, size).
        sources: the linears whose outputs, one or more lots of (heads, size), become these inputs.
    """

    target: Target
    sources: tuple[Part, ...]
    heads: int
    readers: int
    size: int

    def search(self, importance: Tensor, pattern: NM) -> Tensor:
        """Return an order within each head, (heads, size), in which the pattern keeps more of an importance, (out, in)."""
        cut = importance.view(-1, self.heads, self.readers, self.size).transpose(0, 1)
        return torch.stack([search(head.reshape(-1, self.size), pattern.n, pattern.m) for head in cut])

    def inputs(self, order: Tensor) -> Tensor:
        """Return the order of the target's inputs, (in,), where each head's channels are in ``order``."""
        starts = torch.arange(self.heads * self.readers, device=order.device).view(self.heads, self.readers, 1) * self.size
        return (starts + order[:, None]).flatten()

    def fold(self, order: Tensor) -> None:
        """Put the channels in this order, where they are read and where they are put out."""
        matrix = self.target.matrices()[0]
        matrix.copy_(matrix[:, self.inputs(order).to(matrix.device)])
        lot = (torch.arange(self.heads, device=order.device)[:, None] * self.size + order).flatten()
        for source in self.sources:
            outputs = torch.cat([lot + i * len(lot) for i in range(len(source.lots))])
            weight, bias = source.module.weight.data, source.module.bias
            weight.copy_(weight.index_select(source.dim, outputs.to(weight.device)))
            if bias is not None:
                bias.data.copy_(bias.data[outputs.to(bias.device)])


class Permutation:
    """The orders found in one run; none unless the job's pattern permutes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._free: dict[Target, Channels] = {}
        self._found: list[tuple[Channels, Tensor]] = []

    @contextmanager
    def block(self, walk: Calibration, index: int, inside: Sequence[Target]) -> Iterator[None]:
        """Find which channels of a block are free; on leaving, put them in the orders that were found."""
        pattern = self.job.pattern
        if not (isinstance(pattern, NM) and pattern.permute):
            yield
            return
        proposed = (channels for target in inside if (channels := channels_of(walk.model, walk.blocks[index], target)))
        self._free = {c.target: c for c in proposed if c.size % pattern.m == 0 and free(walk, index, c)}
        yield
        for channels, order in self._found:
            channels.fold(order)
        self._found.clear()

    def order(self, target: Target, stats: Sequence[Stats]) -> Tensor | None:
        """Return the order in which to prune the target's inputs, (in,); None: as they are. It is folded in after the block."""
        if target not in self._free:
            return None
        pattern, solver, w, known = self.job.pattern, self.job.solver, target.matrices()[0], stats[0]
        assert isinstance(pattern, NM)
        score = solver.score if isinstance(solver, solvers.Mask) else scores.Wanda()
        importance = score(w, known)
        channels = self._free[target]
        order = channels.search(importance, pattern)
        self._found.append((channels, order))
        inputs = channels.inputs(order)
        before, after = (float((s * pattern.select(s)).sum()) for s in (importance, importance[:, inputs]))
        known.notes["permuted"] = after / before - 1 if before else 0.0
        return inputs


def channels_of(model: nn.Module, block: nn.Module, target: Target) -> Channels | None:
    """Return the input channels of a weight that by the coupling table may be reordered; None if there are none."""
    for kind in ("channels", "heads"):
        try:
            (coupling,) = couplings(model, [block], kind)
        except GossamerError:  # the table knows none in this block, or several
            continue
        if coupling.out is target.module and kind == "channels":
            return Channels(target, coupling.parts[:-1], 1, 1, coupling.count)
        if coupling.out is target.module and len(coupling.parts) == 4:  # the order of a value head is that of all its readers
            return Channels(target, coupling.parts[2:3], coupling.count, coupling.queries, coupling.head_dim)
    return None


def free(walk: Calibration, index: int, channels: Channels) -> bool:
    """Tell whether a linear puts out the same, to rounding, with its channels shuffled; they are put back."""

    def output() -> Tensor:
        return hidden(walk.calls(index, channels.target.module, lanes=1)[0].output).float()

    shuffled = torch.rand(channels.heads, channels.size, generator=torch.Generator().manual_seed(index)).argsort(1)
    before = output()
    channels.fold(shuffled)
    after = output()
    channels.fold(shuffled.argsort(1))
    off = torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before).clamp_min(1e-30)
    return bool(off < torch.finfo(channels.target.parameter.dtype).eps ** 0.5)
