"""Wrapped: an N:M core between two block-diagonal matrices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format, sized, want
from gossamer.core.pattern import Pattern
from gossamer.formats.nm import NM


@dataclass(frozen=True, eq=False)
class Wrapped(Format):
    """W = A·S·B: A and B block-diagonal and dense, S with n of every m kept; a product is three, each rounded to x's dtype.

    It is the result of a method that factorizes, such as `ARMOR`; W itself has no zeros. Beside what `NM` takes, the blocks
    cost (h / in + w / out) values an entry, and as many multiplications.

    Attributes:
        shape: (out, in); h divides out, w divides in.
        n, m: how many of each group of how many the core keeps.
        left: A's blocks, (out / h, h, h).
        values, positions: S, as `NM` stores it.
        right: B's blocks, (in / w, w, w).

    >>> from gossamer.core import pattern
    >>> core = NM.pack(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), pattern=pattern.NM(1, 2))
    >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> Wrapped.of(swap, core, 3 * torch.ones(2, 1, 1)).dense()
    tensor([[6., 0.],
            [0., 3.]])
    """

    shape: tuple[int, int]
    n: int
    m: int
    left: Tensor
    values: Tensor
    positions: Tensor
    right: Tensor

    kernels: ClassVar[tuple[str, ...]] = NM.kernels

    @classmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        raise GossamerError(
            "the format Wrapped holds factors, which no matrix tells: they come of pruning by a method that factorizes (ARMOR)"
        )

    @classmethod
    def of(cls, left: Tensor, core: NM, right: Tensor) -> Self:
        """Wrap a packed core.

        Raises:
            GossamerError: blocks that are not square, do not cover the core's shape, or have another dtype.
        """
        return cls.read(core.shape, {"left": left, "right": right, **core.tensors()}, core.n, core.m)

    @classmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor], n: int = 2, m: int = 4) -> Self:
        shape = sized(shape)
        core = NM.read(shape, tensors, n, m)
        sides = {name: want(tensors, name, (None, None, None), DTYPES) for name in ("left", "right")}
        for size, (name, blocks) in zip(shape, sides.items(), strict=True):
            count, rows, columns = blocks.shape
            if rows != columns or count * rows != size:
                raise GossamerError(f"the packed weight's {name} is {count} blocks of {rows}x{columns}, and no {size}x{size}")
            if blocks.dtype != core.values.dtype:
                raise GossamerError(f"the packed weight's {name} is {blocks.dtype}, and its values are {core.values.dtype}")
        return cls(shape, n, m, values=core.values, positions=core.positions, **sides)

    @property
    def core(self) -> NM:
        """S."""
        return NM(self.shape, self.n, self.m, self.values, self.positions)

    def dense(self) -> Tensor:
        inner = _through(self.core.dense().float(), self.right.transpose(1, 2))
        return _through(inner.T, self.left).T.to(self.values.dtype).contiguous()

    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        if x.shape[-1:] != self.shape[1:]:
            raise GossamerError(f"the weight takes inputs (..., {self.shape[1]}), not {tuple(x.shape)}")
        return _through(self.core.linear(_through(x, self.right), kernel), self.left)


def _through(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x Dᵀ, (..., n), for D the block-diagonal matrix of ``blocks`` (n / b, b, b) and x of shape (..., n)."""
    count, b, _ = blocks.shape
    parts = x.reshape(-1, count, b).transpose(0, 1)
    return torch.bmm(parts, blocks.to(x.dtype).transpose(1, 2)).transpose(0, 1).reshape(x.shape)
