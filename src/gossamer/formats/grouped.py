"""Grouped: tiles of 4-bit integers, each with a scale and a zero, and the column at which it begins."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, checked, sized, starts, want
from gossamer.core.grid import found, tiles, untiled
from gossamer.core.pattern import Block, Pattern
from gossamer.kernels import grouped
from gossamer.kernels.grouped.reference import entries

BITS = 4


@dataclass(frozen=True, eq=False)
class Grouped(Format):
    """Kept tiles of h×w on 4-bit grids, s·(q − z), row of tiles by row: (1 − s)·(½ + (itemsize + 3)/(h·w)) bytes an entry.

    It is for weights that lie on such grids, as `GQSA` leaves them, and the pattern ``1x16``. `dense` rounds s·(q − z) to the
    weight's dtype; a product multiplies with s·(q − z) itself, in float32.

    Attributes:
        shape: (out, in), multiples of h and w; at most 32,767 tiles beside one another.
        h, w: the size of a tile.
        values: q, uint8 (tiles, ⌈h·w / 2⌉): entry j of a tile stands in the low half of byte j, or in the high half of byte
            j − ⌈h·w / 2⌉; a half that is left over is 0.
        scale: s, (tiles,), in the weight's dtype.
        zero: z, uint8 (tiles,), below 16.
        columns: int16 (tiles,), which column of tiles each stands in, rising within a row of tiles.
        offsets: int64 (out / h + 1,), where each row of tiles begins.

    >>> packed = Grouped.pack(torch.tensor([[0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 6.5, 0.5]]), pattern=Block(1, 4))
    >>> [f"{b:02x}" for b in packed.values[0].tolist()], packed.scale.tolist(), packed.zero.tolist(), packed.columns.tolist()
    (['f0', '32'], [0.5], [2], [1])
    """

    shape: tuple[int, int]
    h: int
    w: int
    values: Tensor
    scale: Tensor
    zero: Tensor
    columns: Tensor
    offsets: Tensor

    kernels: ClassVar[tuple[str, ...]] = grouped.KERNELS
    typed: ClassVar[str] = "scale"

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        if not isinstance(pattern, Block):
            raise GossamerError(f"the format Grouped packs a block pattern, such as 1x16, not {pattern}: a mask tells none")
        h, w = pattern.h, pattern.w
        pattern.check(dense.shape, "the weight")
        dense, mask = checked(dense, mask)
        _check_columns(dense.shape[1] // w)
        kept = tiles(mask, h, w).any(-1)
        codes, scale, zero, on = found(tiles(dense, h, w)[kept], BITS)
        if off := int((~on).count_nonzero()):
            raise GossamerError(
                f"{off} of {len(on)} tiles of {h}x{w} are on no grid of 4 bits: the format Grouped wants weights that GQSA "
                "pruned with this pattern, and that have stayed on their grids since"
            )
        half = -(-h * w // 2)
        codes = torch.nn.functional.pad(codes, (0, 2 * half - h * w))
        columns = kept.nonzero()[:, 1].to(torch.int16)
        values = (codes[:, :half] | codes[:, half:] << 4).contiguous()
        return cls((dense.shape[0], dense.shape[1]), h, w, values, scale, zero, columns, starts(kept.sum(1)))

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], h: int = 1, w: int = 16) -> Self:
        shape = sized(shape)
        Block(h, w).check(shape, "the packed weight")
        beside = shape[1] // w
        _check_columns(beside)
        values = want(tensors, "values", (None, -(-h * w // 2)), (torch.uint8,))
        count = len(values)
        scale = want(tensors, "scale", (count,), DTYPES)
        zero = want(tensors, "zero", (count,), (torch.uint8,))
        columns = want(tensors, "columns", (count,), (torch.int16,))
        offsets = want(tensors, "offsets", (shape[0] // h + 1,), (torch.int64,))
        if count and int(zero.max()) > 15:
            raise GossamerError(f"the packed weight has the zero {int(zero.max())}, which is not of 4 bits")
        if h * w % 2 and bool((values[:, -1] > 15).any()):
            raise GossamerError(f"the packed weight's tiles hold more than their {h}x{w} entries")
        if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets[1:] < offsets[:-1]).any()):  # diff may overflow
            raise GossamerError(f"the packed weight's offsets do not rise from 0 to its {count} tiles")
        row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
        flat = row * beside + columns
        if count and (int(columns.min()) < 0 or int(columns.max()) >= beside or bool((flat.diff() <= 0).any())):
            raise GossamerError(f"the packed weight's tile columns do not rise below {beside} in every row")
        return cls(shape, h, w, values, scale, zero, columns, offsets)

    @property
    def nnz(self) -> int:
        return int(entries(self.values, torch.ones_like(self.scale), self.zero, self.h * self.w).count_nonzero())

    def dense(self) -> Tensor:
        own = entries(self.values, self.scale, self.zero, self.h * self.w).to(self.scale.dtype)
        rows = torch.repeat_interleave(torch.arange(self.shape[0] // self.h, device=own.device), self.offsets.diff())
        out = own.new_zeros(self.shape[0] // self.h, self.shape[1] // self.w, self.h * self.w)
        out[rows, self.columns.long()] = own
        return untiled(out, self.h, self.w).contiguous()

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        where = self.columns, self.offsets, self.shape, (self.h, self.w)
        return grouped.linear(x, self.values, self.scale, self.zero, *where, kernel)


def _check_columns(beside: int) -> None:
    if beside > torch.iinfo(torch.int16).max:
        raise GossamerError(f"the format Grouped counts up to 32,767 tiles beside one another, not {beside:,}: take wider ones")
