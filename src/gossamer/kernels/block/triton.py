"""x Wᵀ for dense tiles on a GPU, for any height and width.

One input: the tiles of a row of tiles lie one after another and are read as one stretch. Several: as many of them as make up a
matrix are multiplied on the tensor cores, with the inputs at their columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels._gpu import FEW, added, aligned, by_dense_rows, operands, partial, shares

STRETCH = 2048  # entries read at a time
DEEP = 64  # columns multiplied at a time


def product(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    out, wide = shape
    tiles, h, w = values.shape
    dtype = x.dtype
    if not values.numel() or not len(x):
        return x.new_zeros(len(x), out)
    x, values = operands(x, values)
    packed = values, aligned(columns), offsets
    tall, across, area = (triton.next_power_of_2(n) for n in (h, w, h * w))
    rows = out // h
    each = max(STRETCH // area, 1)  # tiles of a stretch
    with torch.cuda.device(x.device):
        if (len(x) == 1 or (len(x) <= 4 and x.dtype == torch.float32)) and area <= 1 << 14:
            count = shares(rows, -(-tiles // (rows * each)), x.device)
            y = partial(count, len(x), out, x)
            _gather[(rows, count, len(x))](x, *packed, y, out, wide, h, w, each, area, tall, num_warps=4)
            return added(y, dtype)
        if len(x) <= FEW and x.dtype != torch.float32 and 4 <= tall <= 128 and across <= 128:
            deep = max(DEEP // across, 1, 16 // across)  # tiles side by side
            count = shares(rows, -(-tiles // (rows * deep)), x.device)
            y = partial(count, len(x), out, x)
            batch = max(16, triton.next_power_of_2(len(x)))
            across_first = x.t().contiguous()
            _multiply[(rows, count)](
                across_first, *packed, y, out, len(x), h, w, max(tall, 16), across, deep, batch, num_warps=4
            )
            return added(y, dtype)

        def expand(dense: Tensor) -> None:
            dense.zero_()
            piece = min(area, STRETCH)
            _expand[(rows, triton.cdiv(h * w, piece))](dense, *packed, wide, h, w, max(STRETCH // piece, 1), piece)

        return by_dense_rows(x, (out, wide), x.dtype, expand).to(dtype)


@triton.jit(do_not_specialize=["out", "wide"])
def _gather(
    x, values, columns, offsets, y, out, wide,
    h: tl.constexpr, w: tl.constexpr, EACH: tl.constexpr, AREA: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One row of tiles and one input; a part of its sums, (parts, batch, out)."""
    row, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(offsets + row + 1)
    e = tl.arange(0, AREA)[None, :]
    x += b.to(tl.int64) * wide
    total = tl.zeros([EACH, AREA], tl.float32)
    for start in range(tl.load(offsets + row) + part * EACH, end, tl.num_programs(1) * EACH):
        tile = start + tl.arange(0, EACH)
        inside = (tile < end)[:, None] & (e < h * w)
        column = tl.load(columns + tile, mask=tile < end, other=0)
        a = tl.load(values + tile[:, None] * (h * w) + e, mask=inside, other=0.0, eviction_policy="evict_first")
        total += a.to(tl.float32) * tl.load(x + (column * w)[:, None] + e % w, mask=inside, other=0.0).to(tl.float32)
    i = tl.arange(0, TALL)
    here = tl.arange(0, AREA)[None, :] // w == i[:, None]
    rows = tl.sum(tl.where(here, tl.sum(total, 0)[None, :], 0.0), 1)
    at = (part * tl.num_programs(2) + b).to(tl.int64) * out + row * h + i
    tl.store(y + at, rows.to(y.dtype.element_ty), mask=i < h)


@triton.jit(do_not_specialize=["out"])
def _multiply(
    x, values, columns, offsets, y, out, batch,
    h: tl.constexpr, w: tl.constexpr, TALL: tl.constexpr, ACROSS: tl.constexpr, DEEP: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """One row of tiles, up to 64 inputs, which lie side by side: (in, batch); a part of its sums, (parts, batch, out)."""
    row, part = tl.program_id(0), tl.program_id(1)
    end = tl.load(offsets + row + 1)
    i, b = tl.arange(0, TALL), tl.arange(0, BATCH)
    j, which = tl.arange(0, DEEP * ACROSS) % ACROSS, tl.arange(0, DEEP * ACROSS) // ACROSS
    total = tl.zeros([TALL, BATCH], tl.float32)
    for start in range(tl.load(offsets + row) + part * DEEP, end, tl.num_programs(1) * DEEP):
        tile = start + which
        inside = (tile < end) & (j < w)
        column = tl.load(columns + tile, mask=inside, other=0).to(tl.int64) * w + j
        a = tl.load(
            values + (tile[None, :] * h + i[:, None]) * w + j[None, :], mask=inside[None, :] & (i < h)[:, None], other=0.0
        )
        inputs = tl.load(x + column[:, None] * batch + b[None, :], mask=inside[:, None] & (b < batch)[None, :], other=0.0)
        total = tl.dot(a, inputs, total)
    to = (part * batch + b).to(tl.int64)[None, :] * out + row * h + i[:, None]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(i < h)[:, None] & (b < batch)[None, :])


@triton.jit
def _expand(
    dense, values, columns, offsets, wide, h: tl.constexpr, w: tl.constexpr, EACH: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """One row of tiles, a piece of each: put where they stand among zeros."""
    row = tl.program_id(0)
    end = tl.load(offsets + row + 1)
    e = tl.program_id(1) * PIECE + tl.arange(0, PIECE)[None, :]
    for start in range(tl.load(offsets + row), end, EACH):
        tile = (start + tl.arange(0, EACH))[:, None]
        inside = (tile < end) & (e < h * w)
        column = tl.load(columns + tile, mask=tile < end, other=0).to(tl.int64) * w
        a = tl.load(values + tile * (h * w) + e, mask=inside, other=0.0)
        tl.store(dense + (row * h + e // w).to(tl.int64) * wide + column + e % w, a, mask=inside)
