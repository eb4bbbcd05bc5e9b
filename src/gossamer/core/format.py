"""Format: a stored layout of a sparse matrix, and the product that runs on it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Format(ABC):
    """One sparse matrix W of shape (out, in), as plain tensors. Subclasses are frozen dataclasses whose tensors are fields.

    Attributes:
        shape: (out, in).
        values: what is stored of the kept entries.
        derived: names of the fields that follow from the others, which files leave out.
        kernels: the implementations its product has.
        typed: the field whose dtype is the matrix's.
    """

    shape: tuple[int, int]
    values: Tensor
    derived: ClassVar[frozenset[str]] = frozenset()
    kernels: ClassVar[tuple[str, ...]]
    typed: ClassVar[str] = "values"

    @classmethod
    @abstractmethod
    def pack(cls, dense: Tensor, mask: Tensor | None = None, pattern: Pattern | None = None) -> Self:
        """Pack a dense matrix; `dense` gives it back to the bit.

        Args:
            dense: shape (out, in), bfloat16, float16 or float32, in any memory order.
            mask: bool, True = kept; None keeps whatever is not 0 (a -0.0 that is not kept comes back as 0.0).
            pattern: what the mask follows, where the format depends on it.

        Raises:
            GossamerError: a dtype or shape that is not supported, a mask that does not fit, entries not zero outside it.
        """

    @classmethod
    @abstractmethod
    def read(cls, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """Make the format of stored tensors, every one of which is checked: nothing is read out of bounds later.

        Raises:
            GossamerError: a tensor is missing or has another length, dtype or content than the others and the shape ask for.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the matrix, shape (out, in)."""

    @abstractmethod
    def linear(self, x: Tensor, kernel: str = "auto") -> Tensor:
        """Return x Wᵀ for x of shape (..., in): shape (..., out), x's dtype, sums in float32; ``kernel`` says by what."""

    def tensors(self, *, derived: bool = False) -> dict[str, Tensor]:
        """Return the tensors by field name: those a file holds, or all that lie in memory."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v for k, v in found.items() if isinstance(v, Tensor) and (derived or k not in self.derived)}

    @property
    def dtype(self) -> torch.dtype:
        """The matrix's dtype."""
        found: torch.dtype = getattr(self, self.typed).dtype
        return found

    @property
    def nnz(self) -> int:
        """How many stored entries are not zero; of a product, its core's."""
        return int(self.values.count_nonzero())

    @property
    def bytes(self) -> int:
        """What lies in memory."""
        return sum(t.nbytes for t in self.tensors(derived=True).values())


def checked(dense: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a matrix and its mask, fit to be packed.

    Raises:
        GossamerError: see `Format.pack`.
    """
    if dense.dtype not in DTYPES:
        told = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise GossamerError(f"cannot pack {str(dense.dtype).removeprefix('torch.')}: supported are {told}")
    if dense.ndim != 2:
        raise GossamerError(f"packing wants a matrix (out, in), not shape {tuple(dense.shape)}")
    dense = dense.detach()
    there = (dense != 0).contiguous()  # by value: an entry masked by multiplication is -0.0 half of the time
    if mask is None:
        return dense, there
    if mask.dtype != torch.bool or mask.shape != dense.shape:
        told = f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}"
        raise GossamerError(f"the mask must be bool of shape {tuple(dense.shape)}, not {told}")
    if outside := int((there & ~mask).count_nonzero()):
        raise GossamerError(f"{outside} entries outside the mask are not zero: apply the mask first")
    return dense, mask


def sized(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a stored matrix, (out, in).

    Raises:
        GossamerError: it is not two integers, or one is negative.
    """
    if len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise GossamerError(f"the packed weight's shape must be (out, in), not {tuple(shape)}")
    return shape[0], shape[1]


def want(tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Return a stored tensor of the shape (None: any length) and one of the dtypes it must have.

    Raises:
        GossamerError: it is missing or different.
    """
    if name not in tensors:
        raise GossamerError(f"the packed weight has no tensor {name!r}")
    found = tensors[name]
    fits = len(shape) == found.ndim and all(s in (None, n) for s, n in zip(shape, found.shape, strict=True))
    if not fits or found.dtype not in dtypes:
        asked = "x".join("any" if s is None else str(s) for s in shape)
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{'x'.join(map(str, found.shape))} {str(found.dtype).removeprefix('torch.')}"
        raise GossamerError(f"the packed weight's {name} must be {asked} {kinds}, not {got}")
    return found.contiguous()


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool matrix (rows, n) to uint8 (rows, ⌈n / 8⌉): bit j of byte k is column 8k + j, what is left over is 0."""
    rows, n = mask.shape
    whole = torch.nn.functional.pad(mask.view(torch.uint8) if mask.is_contiguous() else mask.to(torch.uint8), (0, -n % 8))
    packed = torch.zeros(rows, whole.shape[1] // 8, dtype=torch.uint8, device=mask.device)
    for j in range(8):
        packed |= whole[:, j::8] << j
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Undo `pack_bits`: bool (rows, n)."""
    mask = torch.empty(packed.shape[0], packed.shape[1] * 8, dtype=torch.bool, device=packed.device)
    for j in range(8):
        mask[:, j::8] = (packed >> j) & 1
    return mask[:, :n]


def count_bits(packed: Tensor) -> Tensor:
    """Count the bits set in each row of uint8 (rows, n): int64 (rows,)."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(1, dtype=torch.int64)


def starts(counts: Tensor) -> Tensor:
    """Return where each run begins and the last one ends: int64 (n + 1,), from the n lengths."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
