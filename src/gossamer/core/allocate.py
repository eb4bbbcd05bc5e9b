"""Allocations: one sparsity turned into a sparsity for each tensor.

An allocation is a function of the tensors by name and of the sparsity of all of them together; hyper-parameters are keyword-
only, so that ``owl(outlier=7.0)`` is a spec. What the tensors have to be is what it ``needs``: nothing (only shapes are read),
"scores", or "wanda" scores. The sparsities it returns keep (1 − S)·Σ n entries in all, to within one entry for each tensor.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import check_sparsity, kept
from gossamer.core.spec import spec

__all__ = ["erk", "global_", "mapping", "owl", "uniform"]  # the allocations by name: what a spec may say

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, float]]
F = TypeVar("F", bound=Callable[..., dict[str, float]])


def needs(*what: str) -> Callable[[F], F]:
    """Declare what the tensors given to an allocation have to be; nothing where their shapes are enough."""

    def declare(allocation: F) -> F:
        allocation.needs = frozenset(what)  # type: ignore[attr-defined]
        return allocation

    return declare


@needs()
def uniform(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """s_i = S for every tensor.

    >>> uniform({"a": torch.empty(2, 2), "b": torch.empty(4, 4)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    sparsity = check_sparsity(sparsity)
    return dict.fromkeys(tensors, sparsity)


@needs()
def erk(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Erdős–Rényi-Kernel: 1 − s_i = ε · Σ dims / Π dims (Evci et al., 2020, RigL, arXiv:1911.11134).

    Small and narrow tensors stay denser. ε makes the total right; a tensor it would give more than all its entries is dense,
    and ε is found again for the rest. A tensor of three dimensions is a stack of matrices: the dims are those of one.

    >>> found = erk({"small": torch.empty(2, 2), "large": torch.empty(8, 8)}, 0.75)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'small': 0.15, 'large': 0.7875}
    """
    sparsity = check_sparsity(sparsity)
    raw = {}
    for name, tensor in tensors.items():
        dims = tensor.shape[1:] if tensor.ndim == 3 else tensor.shape
        raw[name] = sum(dims) / max(math.prod(dims), 1)
    sparse = {name: tensor.numel() for name, tensor in tensors.items() if tensor.numel()}
    budget = (1 - sparsity) * sum(sparse.values())
    found = dict.fromkeys(tensors, 0.0)
    while sparse:
        scale = budget / sum(raw[name] * size for name, size in sparse.items())
        full = [name for name in sparse if scale * raw[name] > 1]
        if not full:
            return found | {name: 1 - scale * raw[name] for name in sparse}
        budget -= sum(sparse.pop(name) for name in full)
    return found


@needs("scores")
def global_(tensors: Mapping[str, Tensor], sparsity: float, *, floor: float = 0.0) -> dict[str, float]:
    """Keep the best entries of all tensors together: s_i = 1 − |{j : S_ij ≥ τ}| / n_i, one τ for all.

    Equal scores are kept in the order of the tensors, then of their index, so the total is exactly round((1 − S)·Σ n). The
    scores must be comparable between tensors, and those of all tensors must be in memory at once; they are compared in float32,
    and nothing of their size is copied. τ is found by bisection over the float32 numbers, at most 32 passes over the scores.

    Args:
        tensors: float scores of each tensor, higher = keep.
        sparsity: fraction of zeros over all tensors, in [0, 1).
        floor: at least this density of each tensor is kept, and at least one entry whatever the floor: where these minima
            alone come to more than the total, the total is exceeded by less than one entry for each tensor.

    Raises:
        GossamerError: the floor is not in [0, 1 − sparsity], or a score is NaN or infinite.

    >>> scores = {"a": torch.tensor([9.0, 8.0, 7.0, 1.0]), "b": torch.tensor([6.0, 2.0, 2.0, 2.0])}
    >>> global_(scores, 0.5), global_(scores, 0.5, floor=0.5)
    ({'a': 0.25, 'b': 0.75}, {'a': 0.5, 'b': 0.5})
    """
    sparsity = check_sparsity(sparsity)
    if not 0 <= floor <= 1 - sparsity:
        raise GossamerError(f"global_(floor=...) is a density from 0 to 1 - sparsity = {1 - sparsity:g}; got {floor!r}")
    scores = [tensor for tensor in tensors.values() if tensor.numel()]
    _check_finite(tensors)
    least = [max(math.ceil(floor * x.numel() - 1e-9), 1) for x in scores]
    total = kept(sparsity, sum(x.numel() for x in scores))
    counts = iter(_shares(scores, least, total))
    return {name: 1 - next(counts) / x.numel() if x.numel() else sparsity for name, x in tensors.items()}


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
    if not (outlier >= 0 and spread >= 0):
        raise GossamerError(f"owl wants outlier >= 0 and spread >= 0; got outlier={outlier!r}, spread={spread!r}")
    _check_finite(tensors)
    blocks: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            blocks.setdefault(_block(name), []).append(tensor)
    sizes = {block: sum(x.numel() for x in scores) for block, scores in blocks.items()}
    ratio = {block: _outliers(scores, outlier) for block, scores in blocks.items()}
    low, high = min(ratio.values(), default=0.0), max(ratio.values(), default=0.0)
    if low == high:
        return dict.fromkeys(tensors, sparsity)
    scaled = {block: (d - low) / (high - low) for block, d in ratio.items()}
    wanted = {block: sparsity - 2 * spread * d for block, d in scaled.items()}
    limits = max(sparsity - spread, 0.0), min(sparsity + spread, math.nextafter(1, 0))
    found = _level(wanted, sizes, sparsity, limits)
    return {name: found.get(_block(name), sparsity) for name in tensors}


@spec
class mapping:
    """The user's own sparsities: s_i = given[name], or that of the first glob pattern that matches the name.

    An exact name goes before every pattern. The total is what the values make it: leave the sparsity out (None), or give the
    total they come to (to within one entry for each tensor); any other is an error.

    Raises:
        GossamerError: a value outside [0, 1), a key that matches no tensor, a tensor that no key matches, or another total.

    >>> tensors = {"layers.0.q": torch.empty(2, 2), "layers.0.k": torch.empty(2, 2)}
    >>> mapping({"*": 0.5, "layers.0.k": 0.25})(tensors)
    {'layers.0.q': 0.5, 'layers.0.k': 0.25}
    """

    given: Mapping[str, float]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.given, Mapping):
            raise GossamerError(f"mapping(given) is a sparsity for each name, such as {{'*.q_proj': 0.5}}; got {self.given!r}")
        object.__setattr__(self, "given", {str(name): check_sparsity(value) for name, value in self.given.items()})

    def __call__(self, tensors: Mapping[str, Tensor], sparsity: float | None = None) -> dict[str, float]:
        for key in self.given:
            if not any(name == key or fnmatchcase(name, key) for name in tensors):
                near = get_close_matches(key, list(tensors), n=3, cutoff=0.0)
                raise GossamerError(f"mapping: {key!r} matches no tensor; the nearest names are {', '.join(near) or '(none)'}")
        found = {}
        for name in tensors:
            keys = [key for key in self.given if key == name] or [key for key in self.given if fnmatchcase(name, key)]
            if not keys:
                near = get_close_matches(name, list(self.given), n=3, cutoff=0.0)
                raise GossamerError(f"mapping: no sparsity for {name!r}; the nearest keys are {', '.join(near) or '(none)'}")
            found[name] = self.given[keys[0]]
        if sparsity is not None:
            size = sum(tensor.numel() for tensor in tensors.values())
            total = sum(kept(s, tensors[name].numel()) for name, s in found.items())
            if abs(total - (1 - check_sparsity(sparsity)) * size) > len(tensors):
                raise GossamerError(
                    f"mapping: the sparsities given come to {1 - total / size:g} in total, which contradicts {sparsity:g}; "
                    "leave the sparsity out"
                )
        return found


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise GossamerError(f"{name}: {bad} of {tensor.numel()} scores are NaN or infinite")


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


def _block(name: str) -> str:
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:end])


def _outliers(scores: Sequence[Tensor], outlier: float) -> float:
    """Return the fraction of entries above ``outlier`` times the mean of all."""
    size = sum(x.numel() for x in scores)
    mean = sum(float(x.sum(dtype=torch.float64)) for x in scores) / size
    return sum(int(torch.count_nonzero(x > outlier * mean)) for x in scores) / size


def _level(wanted: Mapping[str, float], sizes: Mapping[str, int], mean: float, limits: tuple[float, float]) -> dict[str, float]:
    """Shift all of ``wanted`` by one number, within the limits, so that the mean weighted by size is ``mean``."""

    def shifted(by: float) -> dict[str, float]:
        return {name: min(max(value + by, limits[0]), limits[1]) for name, value in wanted.items()}

    low, high = limits[0] - max(wanted.values()), limits[1] - min(wanted.values())  # all at one limit, all at the other
    size = sum(sizes.values())
    for _ in range(100):
        middle = (low + high) / 2
        below = sum(sizes[name] * value for name, value in shifted(middle).items()) < mean * size
        low, high = (middle, high) if below else (low, middle)
    return shifted(high)
