"""Allocations by scores: one ranking of all tensors, or each block by its outliers."""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocate._declared import Allocation, block_of, check_finite, level, needs
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import check_sparsity, kept
from gossamer.core.score import Score
from gossamer.core.spec import show, spec


@needs("scores")
def global_(tensors: Mapping[str, Tensor], sparsity: float, *, floor: float = 0.0, least: int = 1) -> dict[str, float]:
    """Keep the best of all tensors: s_i = 1 − |{j : S_ij ≥ τ}| / n_i (Global MP: Gupta et al., 2022, arXiv:2209.14624).

    One threshold τ for all tensors. Equal scores are kept in the order of the tensors, then of their index, so the total is
    exactly round((1 − S)·Σ n). The scores must be comparable between tensors, and those of all tensors must be in memory at
    once; they are compared in float32, and nothing of their size is copied. τ is found by bisection over the float32 numbers,
    at most 32 passes over the scores.

    Args:
        tensors: float scores of each tensor, higher = keep.
        sparsity: fraction of zeros over all tensors, in [0, 1).
        floor: at least this density of each tensor is kept, and at least one entry whatever the floor: where these minima
            alone come to more than the total, the total is exceeded by less than one entry for each tensor.
        least: at least so many entries of each tensor are kept, the same number for all: the paper's minimum threshold. A
            smaller tensor stays dense. What that takes is taken from the entries nearest to τ, wherever they are (the authors'
            code scales the other tensors' sparsities instead).

    Raises:
        GossamerError: the floor is not in [0, 1 − sparsity], ``least`` comes to more than the total, or a score is NaN or
            infinite.

    >>> scores = {"a": torch.tensor([9.0, 8.0, 7.0, 1.0]), "b": torch.tensor([6.0, 2.0, 2.0, 2.0])}
    >>> global_(scores, 0.5), global_(scores, 0.5, floor=0.5)
    ({'a': 0.25, 'b': 0.75}, {'a': 0.5, 'b': 0.5})
    """
    sparsity = check_sparsity(sparsity)
    if not 0 <= floor <= 1 - sparsity:
        raise GossamerError(f"global_(floor=...) is a density from 0 to 1 - sparsity = {1 - sparsity:g}; got {floor!r}")
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise GossamerError(f"global_(least=...) is how many entries of each tensor stay at least, 1 or more; got {least!r}")
    scores = [tensor for tensor in tensors.values() if tensor.numel()]
    check_finite(tensors)
    minima = [max(math.ceil(floor * x.numel() - 1e-9), min(least, x.numel())) for x in scores]
    total = kept(sparsity, sum(x.numel() for x in scores))
    if least > 1 and sum(minima) > total:
        raise GossamerError(f"global_(least={least}) alone keeps {sum(minima)} entries, more than the {total} that stay in all")
    counts = iter(_shares(scores, minima, total))
    return {name: 1 - next(counts) / x.numel() if x.numel() else sparsity for name, x in tensors.items()}


def _shares(scores: Sequence[Tensor], least: Sequence[int], total: int) -> list[int]:
    """Return how many of each tensor are among the ``total`` best of all, but ``least`` of each at least."""

    def counts(key: int) -> list[int]:
        threshold = _from_key(key)
        return [max(int(torch.count_nonzero(x.float() >= threshold)), m) for x, m in zip(scores, least, strict=True)]

    if sum(least) >= total:
        return list(least)
    low = min(_to_key(float(x.min())) for x in scores)  # counts(low) is everything, counts(high) is the least of each
    high = max(_to_key(float(x.max())) for x in scores) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(counts(middle)) >= total else (low, middle)
    shares, ties = counts(high), counts(low)
    for i, tied in enumerate(ties):
        shares[i] += min(tied - shares[i], total - sum(shares))
    return shares


def _to_key(value: float) -> int:
    """Return the place of a float32 in the order of all of them: neighbours differ by one."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


def _from_key(key: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<i", key if key >= 0 else key ^ 0x7FFFFFFF))[0]
    return value


@needs("wanda")
def owl(tensors: Mapping[str, Tensor], sparsity: float, *, outlier: float = 5.0, spread: float = 0.08) -> dict[str, float]:
    """OWL: a block with more outliers stays denser, S_i ∝ 1 − D_i within [S − λ, S + λ] (Yin et al., 2023, arXiv:2310.05175).

    D_i is the fraction of block i's entries whose Wanda score |W|·‖X‖₂ exceeds M times the block's mean score. D is rescaled
    linearly to a range of width 2λ and centred: S_i = S − 2λ·(d_i − d̄), with d = (D − min D) / (max D − min D) and d̄ its mean
    weighted by size, then limited to the paper's range (and to [0, 1)); what the limits take away is spread evenly over the
    blocks not at a limit, so that the mean weighted by size is S. Where all D are equal the allocation is uniform.

    The block of a tensor is its name up to the first component of digits (``model.layers.3``), and all tensors of a block get
    the block's sparsity; a name without one is a block of its own.

    Args:
        tensors: Wanda scores of each tensor.
        sparsity: fraction of zeros over all tensors, S in [0, 1).
        outlier: M, how many times the mean makes an outlier.
        spread: λ, the farthest from S that a block may be.

    Raises:
        GossamerError: outlier or spread is negative, or a score is NaN or infinite.

    >>> plain, outliers = torch.ones(4, 4), torch.ones(4, 4)
    >>> outliers[0, 0] = 100.0
    >>> found = owl({"layers.0.w": plain, "layers.1.w": outliers}, 0.5)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'layers.0.w': 0.58, 'layers.1.w': 0.42}
    """
    sparsity = check_sparsity(sparsity)
    if not (outlier >= 0 and 0 <= spread < 1):
        raise GossamerError(f"owl wants outlier >= 0 and spread in [0, 1); got outlier={outlier!r}, spread={spread!r}")
    check_finite(tensors)
    blocks: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            blocks.setdefault(block_of(name), []).append(tensor)
    sizes = {block: sum(x.numel() for x in scores) for block, scores in blocks.items()}
    ratio = {block: _outliers(scores, outlier) for block, scores in blocks.items()}
    low, high = min(ratio.values(), default=0.0), max(ratio.values(), default=0.0)
    if low == high:
        return dict.fromkeys(tensors, sparsity)
    scaled = {block: (d - low) / (high - low) for block, d in ratio.items()}
    wanted = {block: sparsity - 2 * spread * d for block, d in scaled.items()}
    limits = max(sparsity - spread, 0.0), min(sparsity + spread, math.nextafter(1, 0))
    found = level(wanted, sizes, sparsity, limits)
    return {name: found.get(block_of(name), sparsity) for name in tensors}


def _outliers(scores: Sequence[Tensor], outlier: float) -> float:
    """Return the fraction of entries above ``outlier`` times the mean of all."""
    size = sum(x.numel() for x in scores)
    mean = sum(float(x.sum(dtype=torch.float64)) for x in scores) / size
    return sum(int(torch.count_nonzero(x > outlier * mean)) for x in scores) / size


@spec
class by:
    """Another score for an allocation: `owl` or `global_` of what ``score`` gives, whatever the method prunes by.

    ``by(RIA, owl)`` counts RIA's outliers; ``by(Wanda, global_)`` ranks for SparseGPT, which has no scores to rank;
    ``by(Gradient, global_)`` with the method Random draws masks at random in the densities that SNIP would give.

    Args:
        score: scores every tensor of the dense model, once.
        allocation: one that reads scores.

    Raises:
        GossamerError: the allocation reads no scores.

    >>> from gossamer.scores import Magnitude
    >>> by(Magnitude(), global_)({"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([1.0, 2.0])}, 0.25)
    {'a': 0.0, 'b': 0.5}
    """

    score: Score
    allocation: Allocation
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        if not isinstance(self.score, Score):
            raise GossamerError(f"by(score, allocation) wants a score first, such as Wanda; got {self.score!r}")
        if not getattr(self.allocation, "needs", frozenset()) & {"scores", "wanda"}:
            raise GossamerError(
                f"by(score, allocation) wants an allocation that reads scores, such as owl; not {show(self.allocation)}"
            )

    def __call__(self, tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
        return self.allocation(tensors, sparsity)
