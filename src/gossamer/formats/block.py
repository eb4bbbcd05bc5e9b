"""Block: dense tiles, and the column at which each begins."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, checked, sized, starts, want
from gossamer.core.pattern import Block as Pattern_Block
from gossamer.core.pattern import Pattern
from gossamer.kernels import block


@dataclass(frozen=True, eq=False)
class Block(Format):
    """Block CSR: kept tiles of h×w entries, row of tiles by row of tiles: (1 − s)·(itemsize + 4/(h·w)) bytes an entry.

    Attributes:
        shape: (out, in), multiples of h and w.
        values: (tiles, h, w).
        columns: int32 (tiles,), which column of tiles each stands in, rising within a row of tiles.
        offsets: int64 (out / h + 1,), where each row of tiles begins.

    >>> packed = Block.pack(torch.tensor([[0.0, 0.0, 1.0, 2.0]]), pattern=Pattern_Block(1, 2))
    >>> packed.values.tolist(), packed.columns.tolist(), packed.offsets.tolist()
    ([[[1.0, 2.0]]], [1], [0, 1])
    """

    shape: tuple[int, int]
    values: Tensor
    columns: Tensor
    offsets: Tensor

    kernels: ClassVar[tuple[str, ...]] = block.KERNELS

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        if not isinstance(pattern, Pattern_Block):
            raise GossamerError(f"the format Block packs a block pattern, such as 4x1, not {pattern}; a mask does not tell it")
        pattern.check(dense.shape, "the weight")
        dense, mask = checked(dense, mask)
        kept = _tiles(mask, pattern.h, pattern.w).any(-1).any(-1)
        columns = kept.nonzero()[:, 1].int()
        values = _tiles(dense, pattern.h, pattern.w)[kept].contiguous()
        return cls((dense.shape[0], dense.shape[1]), values, columns, starts(kept.sum(1)))

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        shape = sized(shape)
        values = want(tensors, "values", (None, None, None), DTYPES)
        tiles, h, w = values.shape
        if not h or not w or shape[0] % h or shape[1] % w:
            raise GossamerError(f"the packed weight's tiles of {h}x{w} do not divide its shape {shape[0]}x{shape[1]}")
        columns = want(tensors, "columns", (tiles,), (torch.int32,))
        offsets = want(tensors, "offsets", (shape[0] // h + 1,), (torch.int64,))
        if int(offsets[0]) != 0 or int(offsets[-1]) != tiles or bool((offsets[1:] < offsets[:-1]).any()):  # diff may overflow
            raise GossamerError(f"the packed weight's offsets do not rise from 0 to its {tiles} tiles")
        row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
        flat = row * (shape[1] // w) + columns
        if tiles and (int(columns.min()) < 0 or int(columns.max()) >= shape[1] // w or bool((flat.diff() <= 0).any())):
            raise GossamerError(f"the packed weight's tile columns do not rise below {shape[1] // w} in every row")
        return cls(shape, values, columns, offsets)

    def dense(self) -> Tensor:
        _, h, w = self.values.shape
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        rows = torch.repeat_interleave(torch.arange(self.shape[0] // h, device=out.device), self.offsets.diff())
        _tiles(out, h, w)[rows, self.columns.long()] = self.values
        return out

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        return block.linear(x, self.values, self.columns, self.offsets, self.shape, kernel)


def _tiles(matrix: Tensor, h: int, w: int) -> Tensor:
    """View a matrix as (out / h, in / w, h, w)."""
    return matrix.unflatten(1, (-1, w)).unflatten(0, (-1, h)).transpose(1, 2)
