"""Patterns: which entries compete with one another, and which live or die together."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec

Pool = Literal["mean", "max", "l2"]


def kept(sparsity: float, units: int) -> int:
    """Return how many of ``units`` stay at ``sparsity``: round((1 − sparsity) · units)."""
    return round((1 - sparsity) * units)


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` as a float, or raise if it is not in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise GossamerError(f"sparsity is the fraction of zeros, in [0, 1); got {sparsity!r}")
    return float(sparsity)


class Pattern(ABC):
    """Which entries compete and which live or die together. Sizes are those of a weight of shape (out, in).

    Attributes:
        shorthand: a regular expression for a short spelling whose groups are the fields ("2:4").
        takes_sparsity: the user chooses a sparsity; False where the pattern itself decides how many stay.
    """

    shorthand: ClassVar[str | None] = None
    takes_sparsity: ClassVar[bool] = True

    @property
    def sparsity(self) -> float | None:
        """The sparsity the pattern itself fixes, or None where the user chooses it."""
        return None

    @property
    def grain(self) -> int | None:
        """In how many steps an allocation may vary the sparsity that the pattern itself fixes; None for any other pattern."""
        return None

    def at(self, sparsity: float | None) -> "Pattern":
        """Return the pattern of one tensor whose share an allocation has set: n of every m for `NM`, itself otherwise."""
        return self

    def resolve(self, sparsity: float | None) -> float | None:
        """Return the sparsity to use: the pattern's own, or the one asked for.

        Raises:
            GossamerError: none given where one is needed, one outside [0, 1), or one that contradicts the pattern.
        """
        if self.sparsity is None:
            if sparsity is None:
                raise GossamerError(f"the pattern {self} needs a sparsity, for example 0.5")
            return check_sparsity(sparsity)
        if sparsity is not None and not math.isclose(check_sparsity(sparsity), self.sparsity, abs_tol=1e-9):
            raise GossamerError(
                f"the pattern {self} fixes its own sparsity at {self.sparsity:g}, which contradicts {sparsity:g}; leave it out"
            )
        return self.sparsity

    def check(self, shape: Sequence[int], name: str = "the tensor") -> None:  # noqa: B027 (most patterns fit any shape)
        """Raise GossamerError if the pattern does not fit a tensor of this shape."""

    def select(self, scores: Tensor, sparsity: float | None = None, *, name: str = "scores") -> Tensor:
        """Keep the entries with the highest scores.

        Args:
            scores: importance of each entry, higher = keep; any floating dtype, shape (..., out, in).
            sparsity: fraction of zeros in [0, 1); None for a pattern that fixes its own.
            name: the tensor's name, for error messages.

        Returns:
            A bool mask of the same shape, True = kept: exactly round((1 − sparsity) · units) units of each competing set;
            equal scores are kept in the order of their index.

        Raises:
            GossamerError: the sparsity or the shape does not fit, or a score is NaN or infinite.
        """
        wanted = self.resolve(sparsity)
        self.check(scores.shape, name)
        if not scores.is_floating_point():
            scores = scores.float()
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()  # exact, and every backend can rank it
        if bad := not_finite(scores):
            raise GossamerError(f"{name}: {bad} of {scores.numel()} scores are NaN or infinite")
        if scores.numel() == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        return self._select(scores, wanted)

    @abstractmethod
    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor: ...


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the k largest entries of each row of (..., n), equal ones in the order of their index."""
    n = scores.shape[-1]
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.is_cuda:  # kthvalue takes a row to one multiprocessor: 3.7 ms for 885,000 entries, topk 0.12 (H100)
        threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    else:
        threshold = scores.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    mask = scores >= threshold
    if int(mask.count_nonzero()) == mask.numel() // n * k:  # no ties at the threshold: the usual case
        return mask
    mask = scores > threshold
    ties = scores == threshold
    room = k - mask.sum(-1, keepdim=True)
    return mask | (ties & (ties.cumsum(-1) <= room))


def not_finite(x: Tensor) -> int:
    """Count the entries that are NaN or infinite; where the sum is finite, which is quick to see, there are none."""
    if bool(x.sum(dtype=torch.float32 if x.itemsize < 4 else None).isfinite()):
        return 0
    return int((~x.isfinite()).sum())


def pooled(x: Tensor, dims: tuple[int, ...], pool: Pool) -> Tensor:
    """Reduce the scores of entries that live or die together to one score."""
    if pool == "max":
        return x.amax(dims)
    return x.mean(dims) if pool == "mean" else x.square().mean(dims).sqrt()


@spec
class Unstructured(Pattern):
    """Any single entry: the kept ones are the best of the whole tensor, or of each output row.

    ``per=None`` leaves the choice to the method: Wanda compares within a row, most others over the tensor (which is what
    None means to `select`).
    """

    per: Literal["tensor", "row"] | None = None

    def __post_init__(self) -> None:
        if self.per not in (None, "tensor", "row"):
            raise GossamerError(f"Unstructured(per=...) is 'tensor' or 'row', not {self.per!r}")

    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor:
        assert sparsity is not None
        flat = scores if self.per == "row" else scores.reshape(1, -1)
        return largest(flat, kept(sparsity, flat.shape[-1])).view(scores.shape)


@spec
class NM(Pattern):
    """``n`` kept of every ``m`` consecutive entries along the input (last) dimension; written ``2:4``.

    With ``permute`` (``NM(2, 4, permute=True)``) the inputs of a weight that can take them in another order are put in one
    in which more of the score is kept. The mask of a tensor on its own is the same.
    """

    n: int
    m: int
    permute: bool = False
    shorthand: ClassVar[str | None] = r"(\d+):(\d+)"
    takes_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n < self.m):
            raise GossamerError(f"N:M keeps n of every m with 0 < n < m; got {self.n}:{self.m}")
        if not isinstance(self.permute, bool):
            raise GossamerError(f"NM(permute=...) is True or False, not {self.permute!r}")

    def __repr__(self) -> str:
        return f"NM({self.n}, {self.m}, permute=True)" if self.permute else f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def grain(self) -> int:
        return self.m

    def at(self, sparsity: float | None) -> "NM":
        return self if sparsity is None else NM(round((1 - sparsity) * self.m), self.m)

    def check(self, shape: Sequence[int], name: str = "the tensor") -> None:
        if len(shape) == 0 or shape[-1] % self.m:
            raise GossamerError(
                f"{name}: the pattern {self} needs an input dimension that {self.m} divides; shape {tuple(shape)}"
            )

    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor:
        # An entry's rank is how many of its group beat it; an earlier equal one does. m passes, no sort.
        groups = torch.unflatten(scores, -1, (-1, self.m))
        rank = torch.zeros(groups.shape, dtype=torch.int32, device=scores.device)
        for j in range(self.m):
            rival = groups[..., j : j + 1]
            rank[..., :j] += rival > groups[..., :j]
            rank[..., j + 1 :] += rival >= groups[..., j + 1 :]
        return (rank < self.n).flatten(-2)


@spec
class Block(Pattern):
    """Tiles of ``h`` output rows × ``w`` input columns that live or die together; written ``4x1``."""

    h: int
    w: int
    pool: Pool = "mean"
    shorthand: ClassVar[str | None] = r"(\d+)x(\d+)"

    def __post_init__(self) -> None:
        if not (isinstance(self.h, int) and isinstance(self.w, int) and self.h > 0 and self.w > 0):
            raise GossamerError(f"a block has a positive height and width; got {self.h}x{self.w}")
        _check_pool(self.pool)

    def __repr__(self) -> str:
        shape = f"{self.h}x{self.w}"
        return shape if self.pool == "mean" else f"Block(h={self.h}, w={self.w}, pool={self.pool!r})"

    def check(self, shape: Sequence[int], name: str = "the tensor") -> None:
        if len(shape) < 2 or shape[-2] % self.h or shape[-1] % self.w:
            raise GossamerError(
                f"{name}: the pattern {self.h}x{self.w} needs rows that {self.h} divides and columns that {self.w} divides; "
                f"shape {tuple(shape)}"
            )

    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor:
        assert sparsity is not None
        tiles = torch.unflatten(torch.unflatten(scores, -1, (-1, self.w)), -3, (-1, self.h))  # (..., out/h, h, in/w, w)
        score = pooled(tiles, (-3, -1), self.pool)
        keep = largest(score.reshape(1, -1), kept(sparsity, score.numel())).view(score.shape)
        return keep[..., :, None, :, None].expand(tiles.shape).reshape(scores.shape)


@spec
class Channel(Pattern):
    """Whole output rows (``dim=0``) or input columns (``dim=1``) of a weight of shape (out, in)."""

    dim: Literal[0, 1]
    pool: Pool = "mean"

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise GossamerError(f"Channel(dim=...) is 0 (output rows) or 1 (input columns), not {self.dim!r}")
        _check_pool(self.pool)

    def check(self, shape: Sequence[int], name: str = "the tensor") -> None:
        if len(shape) != 2:
            raise GossamerError(f"{name}: the pattern {self} needs a matrix; shape {tuple(shape)}")

    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor:
        assert sparsity is not None
        score = pooled(scores, (1 - self.dim,), self.pool)
        keep = largest(score, kept(sparsity, score.numel()))
        return keep.unsqueeze(1 - self.dim).expand(scores.shape).contiguous()


@spec
class TopK(Pattern):
    """The ``k`` best entries of each row; the sparsity follows from the row's length."""

    k: int
    takes_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise GossamerError(f"TopK(k) keeps at least one entry of each row; got {self.k!r}")

    def resolve(self, sparsity: float | None) -> float | None:
        _fixes_no_fraction(self, sparsity)
        return None

    def check(self, shape: Sequence[int], name: str = "the tensor") -> None:
        if len(shape) == 0 or shape[-1] < self.k:
            raise GossamerError(f"{name}: the pattern {self} needs rows of at least {self.k} entries; shape {tuple(shape)}")

    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor:
        return largest(scores, self.k)


@spec
class Threshold(Pattern):
    """Every entry whose score is above ``tau``; the count follows from the scores."""

    tau: float
    takes_sparsity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.tau, int | float) or not math.isfinite(self.tau):
            raise GossamerError(f"Threshold(tau) needs a finite number; got {self.tau!r}")

    def resolve(self, sparsity: float | None) -> float | None:
        _fixes_no_fraction(self, sparsity)
        return None

    def _select(self, scores: Tensor, sparsity: float | None) -> Tensor:
        return scores > self.tau


def _fixes_no_fraction(pattern: Pattern, sparsity: float | None) -> None:
    if sparsity is not None:
        raise GossamerError(f"the pattern {pattern} decides how many stay; leave the sparsity {sparsity:g} out")


def _check_pool(pool: str) -> None:
    if pool not in ("mean", "max", "l2"):
        raise GossamerError(f"pool is 'mean', 'max' or 'l2', not {pool!r}")
