"""Sliced: a value and the step to its column for each kept entry, neighbouring rows side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, checked, sized, starts, want
from gossamer.core.pattern import Pattern
from gossamer.kernels import sliced
from gossamer.kernels.sliced import CHUNK, ROWS, STEP, reference


@dataclass(frozen=True, eq=False)
class Sliced(Format):
    """Sliced ELL with steps of a half or a whole byte: (itemsize + ½ or 1 + 1/8)·(1 − s) bytes an entry, and padding.

    Rows are sorted by their count and cut into slices of 32; a row's entries are cut into *blocks* of 8. The blocks of a slice
    lie as a GPU's warp wants them: 32 lanes side by side are 32 rows, so that values load in one stretch, every lane adds up
    its own row, and all of them read x at about the same place. A gap that a step cannot tell, of more than 15 or 255 columns,
    is bridged by zeros; steps take a half byte where that is less in all. A *chunk*, 4 blocks, has a base, so that a row can
    be entered at many places at once. (Sliced ELL: Monakov, Lokhmotov and Avetisyan, 2010; rows sorted: Kreutzer et al., 2014,
    arXiv:1307.6209.)

    Attributes:
        shape: (out, in).
        values: (total,); entry t of row r of a slice stands at ((begin + t // 8)·32 + r)·8 + t % 8, begin in blocks.
        steps: uint8 (total,), from the entry before to this one's column, 0 where a chunk begins; or (total / 2,), where byte
            i of a block holds the steps of entries i (low) and i + 4 (high).
        bases: int32 ((⌊blocks / 4⌋ + slices)·32,), the column at which a chunk of a row begins: chunk c of row r of slice s at
            (⌊begin / 4⌋ + s + c)·32 + r. The last column where nothing is left of the row.
        ends: int32 (slices + 1,), where each slice begins, in blocks of 32·8 entries.
        counts: int32 (slices · 32,), how many entries (bridges included) each sorted row has.
        order: int32 (slices · 32,), which row of the matrix each sorted row is; out for the last ones, there to fill up.
    """

    shape: tuple[int, int]
    values: Tensor
    steps: Tensor
    bases: Tensor
    ends: Tensor
    counts: Tensor
    order: Tensor

    kernels: ClassVar[tuple[str, ...]] = sliced.KERNELS

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        dense, mask = checked(dense, mask)
        rows, columns = dense.shape
        device = dense.device
        row, column = mask.nonzero(as_tuple=True)
        values = dense[row, column]

        # Bridge gaps: `extra` zeros before an entry, `reach` columns apart.
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        gap = column.diff(prepend=column.new_zeros(1)).masked_fill(first, 0)
        halves, whole = (len(gap) + int(((gap - 1).clamp_min(0) // reach).sum()) for reach in (15, 255))
        half = halves * (dense.itemsize + 0.5) <= whole * (dense.itemsize + 1)
        reach = 15 if half else 255
        extra = ((gap - 1).clamp_min(0)) // reach
        if bool(extra.any()):
            source = torch.repeat_interleave(extra + 1)
            left = starts(extra + 1)[1:][source] - 1 - torch.arange(len(source), device=device)  # bridges still to come
            values = values[source].masked_fill(left > 0, 0)
            row, column = row[source], column[source] - reach * left
            gap = torch.where(left == extra[source], (gap - reach * extra)[source], reach)  # the first takes what is left over

        counts = torch.bincount(row, minlength=rows)
        slices = -(-rows // ROWS)
        order = torch.full((slices * ROWS,), rows, dtype=torch.int64, device=device)
        order[:rows] = counts.argsort(descending=True, stable=True)
        sorted_counts = torch.nn.functional.pad(counts, (0, 1))[order]
        ends = starts(-(-sorted_counts.view(slices, ROWS).amax(1) // STEP))

        rank = torch.empty(rows, dtype=torch.int64, device=device)
        rank[order[:rows]] = torch.arange(rows, device=device)
        t = torch.arange(len(row), device=device) - starts(counts)[row]
        place, lane = rank[row] // ROWS, rank[row] % ROWS
        at = ((ends[place] + t // STEP) * ROWS + lane) * STEP + t % STEP
        blocks = int(ends[-1])
        packed = torch.zeros(blocks * ROWS * STEP, dtype=dense.dtype, device=device)
        packed[at] = values
        opening = t % (CHUNK * STEP) == 0
        steps = torch.zeros(len(packed), dtype=torch.uint8, device=device)
        steps[at] = gap.masked_fill(opening, 0).to(torch.uint8)
        if half:
            low, high = steps.view(-1, 2, STEP // 2).unbind(1)
            steps = (low | high << 4).flatten()
        bases = torch.full(((blocks // CHUNK + slices) * ROWS,), max(columns - 1, 0), dtype=torch.int32, device=device)
        chunk = ends[place] // CHUNK + place + t // (CHUNK * STEP)
        bases[(chunk * ROWS + lane)[opening]] = column[opening].int()
        return cls((rows, columns), packed, steps, bases, ends.int(), sorted_counts.int(), order.int())

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        rows, columns = shape = sized(shape)
        slices = -(-rows // ROWS)
        ends = want(tensors, "ends", (slices + 1,), (torch.int32,))
        lengths = ends.long().diff()
        if int(ends[0]) != 0 or bool((lengths < 0).any()):
            raise GossamerError("the packed weight's ends do not rise from 0")
        blocks = int(ends[-1])
        total = blocks * ROWS * STEP
        values = want(tensors, "values", (total,), DTYPES)
        half = "steps" in tensors and tensors["steps"].shape == (total // 2,)
        steps = want(tensors, "steps", (total // 2 if half else total,), (torch.uint8,))
        bases = want(tensors, "bases", ((blocks // CHUNK + slices) * ROWS,), (torch.int32,))
        counts = want(tensors, "counts", (slices * ROWS,), (torch.int32,))
        order = want(tensors, "order", (slices * ROWS,), (torch.int32,))
        room = (lengths * STEP).repeat_interleave(ROWS)
        room[rows:] = 0
        if bool((counts < 0).any()) or bool((counts > room).any()):
            raise GossamerError("the packed weight's counts are more than its slices hold")
        everyone = torch.arange(rows, dtype=torch.int32, device=order.device)
        if not torch.equal(order[:rows].sort().values, everyone) or bool((order[rows:] != rows).any()):
            raise GossamerError(f"the packed weight's order is no permutation of its {rows} rows")
        found = cls(shape, values, steps, bases, ends, counts, order)
        row, column, real = found._entries()
        if len(column) and (int(column.min()) < 0 or int(column.max()) >= columns):
            raise GossamerError(f"the packed weight's columns go beyond its {columns}")
        if bool((values[~real] != 0).any()):
            raise GossamerError("the packed weight has values beyond its counts")
        place = torch.repeat_interleave(torch.arange(slices, device=order.device), lengths)
        walk = column.view(-1, ROWS, STEP)
        if bool((walk[1:, :, 0] < walk[:-1, :, -1])[place[1:] == place[:-1]].any()):
            raise GossamerError("the packed weight's columns fall along a row")
        there = torch.zeros(shape, dtype=torch.bool, device=order.device)
        there[row[real], column[real]] = True
        if int(there.count_nonzero()) != int(real.count_nonzero()):
            raise GossamerError("the packed weight has two entries in one place")
        return found

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, column, whether it is an entry rather than padding) of everything stored, in storage order."""
        row, column, place = reference.columns(self.steps, self.bases, self.ends)
        block = torch.arange(len(column), device=row.device)[:, None, None] - self.ends.long()[place]
        real = block * STEP + torch.arange(STEP, device=row.device) < self.counts.long()[row]
        return self.order.long()[row.reshape(-1)], column.reshape(-1), real.reshape(-1)

    def dense(self) -> Tensor:
        row, column, real = self._entries()
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        out[row[real], column[real]] = self.values[real]
        return out

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        return sliced.linear(x, self.values, self.steps, self.bases, self.ends, self.order, self.shape, kernel)
