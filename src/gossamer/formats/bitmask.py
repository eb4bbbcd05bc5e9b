"""Bitmask: one bit a position, and the kept values in order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, checked, count_bits, pack_bits, sized, starts, unpack_bits, want
from gossamer.core.pattern import Pattern
from gossamer.kernels import bitmask


@dataclass(frozen=True, eq=False)
class Bitmask(Format):
    """Kept values row by row, and a bit for each position: (1 − s)·itemsize + 1/8 bytes an entry at sparsity s.

    Attributes:
        shape: (out, in).
        values: (nnz,), the kept entries of row 0, then of row 1, ...
        bits: uint8 (out, ⌈in / 8⌉); bit j of byte k of a row is its column 8k + j.
        offsets: int64 (out + 1,), where each row's values begin; follows from the bits.

    >>> packed = Bitmask.pack(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]]))
    >>> packed.values.tolist(), packed.bits.flatten().tolist(), packed.offsets.tolist()
    ([2.0, 3.0, 4.0], [2, 5], [0, 1, 3])
    """

    shape: tuple[int, int]
    values: Tensor
    bits: Tensor
    offsets: Tensor
    derived: ClassVar[frozenset[str]] = frozenset({"offsets"})
    kernels: ClassVar[tuple[str, ...]] = bitmask.KERNELS

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        dense, mask = checked(dense, mask)
        bits = pack_bits(mask)
        return cls((dense.shape[0], dense.shape[1]), dense[mask], bits, starts(count_bits(bits)))

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        rows, columns = shape = sized(shape)
        bits = want(tensors, "bits", (rows, -(-columns // 8)), (torch.uint8,))
        values = want(tensors, "values", (None,), DTYPES)
        if columns % 8 and bool((bits[:, -1] >> columns % 8).any()):
            raise GossamerError(f"the packed weight's mask keeps columns beyond its {columns}")
        offsets = starts(count_bits(bits))
        if (kept := int(offsets[-1])) != len(values):
            raise GossamerError(f"the packed weight's mask keeps {kept} entries, but there are {len(values)} values")
        return cls(shape, values, bits, offsets)

    def dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        return out.masked_scatter_(unpack_bits(self.bits, self.shape[1]), self.values)

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        return bitmask.linear(x, self.values, self.bits, self.offsets, self.shape[1], kernel)
