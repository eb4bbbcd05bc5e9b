"""x Wᵀ for tiles on 4-bit grids on the CPU: the work is cut into equal numbers of tiles, wherever rows end.

A stretch of tiles writes the rows that begin in it. What it has of a row that began before, it leaves beside, and that is added
when all are done: so a row of many tiles keeps no thread waiting, and the sums are the same on any number of threads. More than
`FEW` inputs go through rows made dense, a few at a time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gossamer.kernels import _team, _tiles
from gossamer.kernels._simd import address, halves_dot, load_f32, load_i64, load_u8, load_u16, store_f32, take

FEW = 4
STRETCH = 1 << 13  # entries of a stretch, about


@njit(inline="always")
def _code(codes, j, half):  # type: ignore[no-untyped-def]
    """Entry j of a tile."""
    return load_u8(codes, j) & 15 if j < half else load_u8(codes, j - half) >> 4


@njit(inline="always")
def _run(codes, scales, zeros, columns, first, last, half, x):  # type: ignore[no-untyped-def]
    """Σ s·(q − z)·x over tiles of one row and 2·half entries, half a multiple of 8."""
    total = np.float32(0)
    for tile in range(first, last):
        low, line, zero = x + load_u16(columns, tile) * (8 * half), codes + tile * half, np.float32(load_u8(zeros, tile))
        dot = np.float32(0)
        for j in range(0, half, 8):
            dot += halves_dot(line + j, zero, low + 4 * j, low + 4 * (half + j))
        total += load_f32(scales, tile) * dot
    return total


@_team.compiled(_team.JOB)
def _stretches(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    # Entries 0 to 2: what `_team.share` writes, of stretches; from 3 on: as `product` gives them.
    count, task, scales, wide = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4)
    columns, offsets = load_i64(job, 5), load_i64(job, 6)
    codes, zeros, h, w = load_i64(job, 7), load_i64(job, 8), load_i64(job, 9), load_i64(job, 10)
    each, x, batch, y, out = load_i64(job, 11), load_i64(job, 12), load_i64(job, 13), load_i64(job, 14), load_i64(job, 15)
    rest, tiles, rows, half = load_i64(job, 16), load_i64(job, 17), out // h, (h * w + 1) // 2
    while True:
        low = take(job) * task
        if low >= count:
            return
        for stretch in range(low, min(count, low + task)):
            begin, end = stretch * each, min(stretch * each + each, tiles)
            row, above = 0, rows  # the row that the first tile is in: the last one that begins there or before
            while above - row > 1:
                middle = (row + above) // 2
                if load_i64(offsets, middle) <= begin:
                    row = middle
                else:
                    above = middle
            at = begin
            while at < end:
                stop, head = min(load_i64(offsets, row + 1), end), load_i64(offsets, row)
                for b in range(batch):
                    near = x + b * wide * 4
                    to = rest + (stretch * batch + b) * h * 4 if head < begin else y + (b * out + row * h) * 4
                    if h == 1 and w == 16:  # a constant: the loop over a tile goes away
                        store_f32(to, 0, _run(codes, scales, zeros, columns, at, stop, 8, near))
                    elif h == 1 and w % 16 == 0:
                        store_f32(to, 0, _run(codes, scales, zeros, columns, at, stop, half, near))
                    else:
                        for i in range(h):
                            total = np.float32(0)
                            for tile in range(at, stop):
                                from_, zero, dot = near + load_u16(columns, tile) * w * 4, load_u8(zeros, tile), np.float32(0)
                                for j in range(w):
                                    code = _code(codes + tile * half, i * w + j, half)
                                    dot += np.float32(code - zero) * load_f32(from_, j)
                                total += load_f32(scales, tile) * dot
                            store_f32(to, i, total)
                at = stop
                row += 1


@_team.compiled(_tiles.SPREAD)
def _spread(operands, unit, to):  # type: ignore[no-untyped-def]
    scales, columns, line = load_i64(operands, 0), load_i64(operands, 3), load_i64(operands, 2)
    offsets, codes, zeros = load_i64(operands, 4), load_i64(operands, 5), load_i64(operands, 6)
    h, w = load_i64(operands, 7), load_i64(operands, 8)
    half = (h * w + 1) // 2
    _tiles.clear(to, h * line, 4)
    for tile in range(load_i64(offsets, unit), load_i64(offsets, unit + 1)):
        scale, zero, at = load_f32(scales, tile), load_u8(zeros, tile), load_u16(columns, tile) * w
        for i in range(h):
            for j in range(w):
                code = _code(codes + tile * half, i * w + j, half)
                store_f32(to + i * line * 4, at + j, scale * np.float32(code - zero))


def product(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    (out, wide), (h, w), scale = shape, tile, scale.float()
    pointers = offsets.data_ptr(), values.data_ptr(), zero.data_ptr()
    if len(x) > FEW:
        return _tiles.product(x, _spread, out // h, h, wide, scale, columns.data_ptr(), *pointers, h, w)
    inputs, y = x.float().contiguous(), torch.zeros(len(x), out)
    each = max(STRETCH // (h * w), 1)
    count = -(-len(values) // each)
    rest = torch.zeros(count, len(x), h)
    if count and len(x):
        sizes = h, w, each, inputs.data_ptr(), len(x), y.data_ptr(), out, rest.data_ptr(), len(values)
        work = values.numel() * 2 * len(x)
        _team.share(_stretches, count, work, scale.data_ptr(), wide, columns.data_ptr(), *pointers, *sizes)
        row = torch.searchsorted(offsets, torch.arange(count) * each, right=True) - 1  # of the first tile of each stretch
        y.view(len(x), out // h, h).index_add_(1, row, rest.transpose(0, 1))
    return y.to(x.dtype)
