"""The products and their weights, and how far from the exact result a product may be."""

import importlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import formats
from gossamer.core.format import DTYPES, Format
from gossamer.core.pattern import Pattern
from gossamer.kernels import _choice
from gossamer.kernels._cases import Case
from gossamer.sites._job import pattern_of

FORMATS: dict[str, type[Format]] = {
    "bitmask": formats.Bitmask,
    "block": formats.Block,
    "nm": formats.NM,
    "sliced": formats.Sliced,
    "tiled": formats.Tiled,
}
MIDDLING = {
    "bitmask": Case(130, 513),
    "block": Case(128, 520, "4x4"),
    "nm": Case(130, 516, "2:4", None),
    "sliced": Case(130, 513),
    "tiled": Case(130, 513),
}
ON_CPU = ("avx512", "avx2", "portable", "reference")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(op: str) -> tuple[Case, ...]:
    return importlib.import_module(f"gossamer.kernels.{op}.cases").TESTED  # type: ignore[no-any-return]


def kernels(op: str) -> list[Any]:
    """Return what the product has on a CPU; avx512 and avx2 are skipped where the processor has not got them."""
    there = importlib.import_module(f"gossamer.kernels.{op}").KERNELS
    skips = {
        "avx512": pytest.mark.skipif(not _choice.has_avx512(), reason="the processor has no AVX-512 with VBMI2"),
        "avx2": pytest.mark.skipif(not _choice.has_avx2(), reason="the processor has no AVX2 with FMA and F16C"),
    }
    return [pytest.param(k, marks=[skips[k]] if k in skips else []) for k in ON_CPU if k in there]


def every_kernel() -> list[Any]:
    return [pytest.param(op, *k.values, marks=k.marks, id=f"{op}-{k.values[0]}") for op in FORMATS for k in kernels(op)]


def matrix(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Pattern]:
    """Return a random weight, its mask and its pattern; some kept entries are zero, and one is -0.0."""
    generator = torch.Generator().manual_seed(seed)
    pattern = pattern_of(case.pattern)
    scores = torch.rand(case.rows, case.columns, generator=generator)
    empty = case.sparsity == 1
    mask = torch.zeros_like(scores, dtype=torch.bool) if empty else pattern.select(scores, case.sparsity)
    dense = torch.randn(case.rows, case.columns, generator=generator).to(dtype)
    dense[torch.rand(dense.shape, generator=generator) < 0.02] = 0
    if mask.any():
        dense[tuple(mask.nonzero()[-1])] = -0.0
    return dense.masked_fill(~mask, 0), mask, pattern


@cache
def packed(op: str, case: Case, dtype: torch.dtype) -> Format:
    return FORMATS[op].pack(*matrix(case, dtype))


def inputs(batch: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(y: Tensor, x: Tensor, dense: Tensor) -> None:
    """Assert that y is x Wᵀ with sums in float32, entry by entry.

    A sum of k products in float32, in any order, is off by at most (k + 2)·2⁻²⁴·Σ|w||x|; then y is rounded to its dtype.
    """
    assert y.shape == (*x.shape[:-1], dense.shape[0])
    assert y.dtype == x.dtype
    x, w = x.double(), dense.double()
    exact, size = x @ w.T, x.abs() @ w.abs().T
    summed = ((w != 0).sum(1) + 2) * 2.0**-24 * size
    info = torch.finfo(y.dtype)
    budget = summed + info.eps / 2 * (exact.abs() + summed) + info.smallest_normal * info.eps
    over = (y.double() - exact).abs() > budget  # NaN is not over, but not equal to itself
    assert not bool(y.isnan().any() | over.any()), float(((y.double() - exact).abs() / budget).max())


DTYPE_IDS = {"argnames": "dtype", "argvalues": DTYPES, "ids": name}
