"""Tiled: a bitmask in the order in which tensor cores take their operand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, checked, pack_bits, sized, want
from gossamer.core.pattern import Pattern
from gossamer.kernels import tiled
from gossamer.kernels.tiled import LANES, PIECE, SHARE, arranged, begins, blocks, places, reference


@dataclass(frozen=True, eq=False)
class Tiled(Format):
    """A bitmask in tensor cores' order, for 1 to 64 inputs on a GPU: (1 − s)·2 + 1/8 bytes an entry, and a little padding.

    A block of 16×256 entries belongs to a warp: each of its 32 lanes finds its 128 entries in the order in which it multiplies
    them, eight columns of a row at a time (see `gossamer.kernels.tiled.layout`). What a lane keeps lies two entries of 16 bits
    to a word, and words lie as they are loaded: the first of all lanes, then the second, so that every lane can go on at its
    own pace without knowing of the others. (Bitmaps in tensor cores' order: Fan et al., 2025, SpInfer,
    doi:10.1145/3689031.3717481, where a lane counts the bits of the others to find its own.)

    Attributes:
        shape: (out, in).
        values: (total,); of 16 bits, a lane's odd one is followed by a zero.
        bits: uint8 (blocks, 32, 16), each lane's mask; bit j of byte 2u + h of lane 4g + t is row g + 8h, column 32u + 8t + j.
        begins: int32 (blocks + 1,), the word at which each block begins; follows from the bits.
        levels: the most words that a lane has in a block; follows from the bits.

    >>> packed = Tiled.pack(torch.eye(20, 40, dtype=torch.bfloat16))
    >>> packed.bits.shape, packed.levels, bool((packed.dense() == torch.eye(20, 40)).all())
    (torch.Size([2, 32, 16]), 1, True)
    """

    shape: tuple[int, int]
    values: Tensor
    bits: Tensor
    begins: Tensor
    levels: int

    derived: ClassVar[frozenset[str]] = frozenset({"begins"})
    kernels: ClassVar[tuple[str, ...]] = tiled.KERNELS

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        dense, mask = checked(dense, mask)
        kept, lanes = arranged(mask), arranged(dense)
        entries = 4 // dense.itemsize
        first = begins(kept, entries)
        values = torch.zeros(entries * int(first[-1]), dtype=dense.dtype, device=dense.device)
        for piece, own, begin in zip(kept.split(PIECE), lanes.split(PIECE), first[::PIECE], strict=False):
            values[begin * entries + places(piece, entries)] = own[piece]
        bits = pack_bits(kept.view(-1, SHARE)).view(len(kept), LANES, SHARE // 8)
        return cls((dense.shape[0], dense.shape[1]), values, bits, first.int(), _levels(kept, entries))

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        shape = sized(shape)
        down, across = blocks(shape)
        bits = want(tensors, "bits", (down * across, LANES, SHARE // 8), (torch.uint8,))
        values = want(tensors, "values", (None,), DTYPES)
        kept = reference.mask(bits)
        if bool((kept & ~arranged(torch.ones(shape, dtype=torch.bool, device=bits.device))).any()):
            raise GossamerError(f"the packed weight's mask keeps entries beyond its shape {shape}")
        entries = 4 // values.itemsize
        first = begins(kept, entries)
        if (room := entries * int(first[-1])) != len(values):
            raise GossamerError(f"the packed weight's mask has room for {room} values, but there are {len(values)}")
        return cls(shape, values, bits, first.int(), _levels(kept, entries))

    def dense(self) -> Tensor:
        return reference.dense(self.values, self.bits, self.shape)

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        return tiled.linear(x, self.values, self.bits, self.begins, self.levels, self.shape, kernel)


def _levels(kept: Tensor, entries: int) -> int:
    return -(-int(kept.sum(-1).max()) // entries) if len(kept) else 0
