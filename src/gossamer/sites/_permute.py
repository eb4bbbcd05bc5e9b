"""Input channels in another order, so that n:m keeps more; what puts them out is reordered too, and the function is the same.

Which channels may be reordered is proposed by the names of modules that stand beside one another, no model family named, and
decided by a trial: a weight whose output is another with them shuffled (a gate or a norm stands between) is left alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer import scores, solvers
from gossamer.core.pattern import NM
from gossamer.core.permute import search
from gossamer.core.stats import Stats
from gossamer.sites._calibrate import Calibration
from gossamer.sites._job import Job
from gossamer.sites._refit import hidden
from gossamer.sites._walk import Target

# A linear whose inputs are channels, and the linears beside it that put these out.
CHANNELS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "down_proj": (("gate_proj", "up_proj"), ("up_proj",)),
    "fc2": (("fc1",),),
    "c_proj": (("c_fc",),),
    "dense_4h_to_h": (("dense_h_to_4h",),),
}
# The same within heads: the order of a value head is that of every query head that reads it.
HEADS: Mapping[str, tuple[tuple[str, ...], ...]] = dict.fromkeys(("o_proj", "out_proj", "dense"), (("v_proj",),))


@dataclass(frozen=True, eq=False)
class Channels:
    """The inputs of a weight that may be reordered: ``heads`` sets of ``size`` channels, each read ``readers`` times.

    Attributes:
        target: the weight, whose inputs are (heads, readers, size).
        sources: the linears whose outputs, (heads, size), become these inputs.
    """

    target: Target
    sources: tuple[nn.Module, ...]
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
        outputs = (torch.arange(self.heads, device=order.device)[:, None] * self.size + order).flatten()
        for source in self.sources:
            weight, bias = source.get_parameter("weight").data, getattr(source, "bias", None)
            dim = 0 if isinstance(source, nn.Linear) else 1  # Conv1D is stored (in, out)
            weight.copy_(weight.index_select(dim, outputs.to(weight.device)))
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
        proposed = (channels for target in inside if (channels := channels_of(walk.blocks[index], target)))
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


def channels_of(block: nn.Module, target: Target) -> Channels | None:
    """Return the input channels of a weight that by its name and its neighbours' may be reordered; None if there are none."""
    modules = dict(block.named_modules())
    name = next(name for name, module in modules.items() if module is target.module)
    parent, _, own = name.rpartition(".")
    beside = modules[parent]
    for table, within_heads in ((CHANNELS, False), (HEADS, True)):
        for names in table.get(own, ()):
            if not all(isinstance(getattr(getattr(beside, source, None), "weight", None), Tensor) for source in names):
                continue
            sources = tuple(beside.get_submodule(source) for source in names)
            widths = {_outputs(source) for source in sources}
            size = getattr(beside, "head_dim", None) if within_heads else min(widths)
            inputs = target.matrices().shape[-1]
            if len(widths) > 1 or not isinstance(size, int) or inputs % min(widths) or min(widths) % size:
                continue
            if within_heads or inputs == size:
                return Channels(target, sources, min(widths) // size, inputs // min(widths), size)
    return None


def _outputs(linear: nn.Module) -> int:
    return linear.get_parameter("weight").shape[0 if isinstance(linear, nn.Linear) else 1]


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
