"""NM: the n kept values of every m, and where in their group each stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, checked, sized, want
from gossamer.core.pattern import NM as Pattern_NM
from gossamer.core.pattern import Pattern
from gossamer.kernels import nm


@dataclass(frozen=True, eq=False)
class NM(Format):
    """n values of every m, with positions of 1, 2, 4 or 8 bits: (itemsize + bits/8)·n/m bytes an entry.

    Attributes:
        shape: (out, in); m divides in.
        n, m: how many of each group of how many are kept.
        values: (out, in·n/m), group by group, in the order of their position.
        positions: uint8 (out, ⌈in·n/m·bits / 8⌉), each value's index in its group, the first in the lowest bits.

    >>> packed = NM.pack(torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 4.0, 0.0, 0.0]]), pattern=Pattern_NM(2, 4))
    >>> packed.values.tolist(), [f"{b:08b}" for b in packed.positions[0].tolist()]
    ([[1.0, 2.0, 3.0, 4.0]], ['01001101'])
    """

    shape: tuple[int, int]
    n: int
    m: int
    values: Tensor
    positions: Tensor

    kernels: ClassVar[tuple[str, ...]] = nm.KERNELS

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        if not isinstance(pattern, Pattern_NM):
            raise GossamerError(f"the format NM packs an N:M pattern, such as 2:4, not {pattern}; a mask does not tell it")
        n, m = pattern.n, pattern.m
        bits = width(m)
        pattern.check(dense.shape, "the weight")
        dense, mask = checked(dense, mask)
        groups = mask.unflatten(1, (-1, m))
        kept = groups.sum(-1)
        if int(kept.max() if kept.numel() else 0) > n:
            raise GossamerError(f"the weight keeps {int(kept.max())} of a group of {m}, more than {pattern} allows")
        # A stable sort of (not kept) puts each group's kept positions first, in order; zeros fill up a group that keeps fewer.
        order = (~groups).to(torch.uint8).argsort(dim=-1, stable=True)[..., :n].sort(dim=-1).values
        values = dense[_mask(order, m)].view(len(dense), dense.shape[1] // m * n)
        return cls((dense.shape[0], dense.shape[1]), n, m, values, _pack(order.flatten(1), bits))

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], n: int = 2, m: int = 4) -> Self:
        shape = sized(shape)
        Pattern_NM(n, m).check(shape, "the packed weight")
        rows, kept, bits = shape[0], shape[1] // m * n, width(m)
        values = want(tensors, "values", (rows, kept), DTYPES)
        positions = want(tensors, "positions", (rows, -(-kept * bits // 8)), (torch.uint8,))
        index = _unpack(positions, bits, kept).unflatten(1, (-1, n))
        if bool((index >= m).any()) or bool((index[..., 1:] <= index[..., :-1]).any()):
            raise GossamerError(f"the packed weight's positions are not {n} increasing ones below {m} in every group")
        return cls(shape, n, m, values, positions)

    def dense(self) -> Tensor:
        out = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        index = _unpack(self.positions, width(self.m), self.values.shape[1])
        out[_mask(index.unflatten(1, (-1, self.n)), self.m)] = self.values.flatten()
        return out

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        return nm.linear(x, self.values, self.positions, self.n, self.m, kernel)


def width(m: int) -> int:
    """Return the bits of a position below m: the next of 1, 2, 4 and 8."""
    if m > 256:
        raise GossamerError(f"the format NM packs groups of up to 256, not of {m}")
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def _mask(index: Tensor, m: int) -> Tensor:
    """Return what is kept, bool (out, in), from the positions in each group, (out, in / m, n).

    Values are taken and put by a mask, since `gather` and `scatter` change the bits of some NaNs.
    """
    return torch.zeros(*index.shape[:2], m, dtype=torch.bool, device=index.device).scatter_(-1, index.long(), True).flatten(1)


def _pack(index: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    whole = torch.nn.functional.pad(index.to(torch.uint8), (0, -index.shape[1] % each))
    packed = torch.zeros(whole.shape[0], whole.shape[1] // each, dtype=torch.uint8, device=index.device)
    for j in range(each):
        packed |= whole[:, j::each] << (j * bits)
    return packed


def _unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    each = 8 // bits
    index = torch.empty(packed.shape[0], packed.shape[1] * each, dtype=torch.uint8, device=packed.device)
    for j in range(each):
        index[:, j::each] = (packed >> (j * bits)) & ((1 << bits) - 1)
    return index[:, :n]
