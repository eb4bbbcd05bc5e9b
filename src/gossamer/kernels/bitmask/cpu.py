"""x Wᵀ for a bitmask on the CPU: values are spread to their columns in registers, so memory carries only what is kept.

Up to `FEW` inputs go through a product of rows with the mask; more go through a tile of rows made dense. Where a list of what
is kept takes less time than either, `cpu_listed` does it.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gossamer.kernels import _avx2, _team, _tiles
from gossamer.kernels._avx512 import masked_dot, masked_expand
from gossamer.kernels._choice import cpu_features
from gossamer.kernels._simd import (
    Kind,
    address,
    copy_bits,
    load_f32,
    load_float,
    load_i32,
    load_i64,
    load_u8,
    lowest,
    ones,
    store_f32,
    take,
)
from gossamer.kernels.bitmask import cpu_listed

# Inputs that are multiplied with a row spread in registers; more, with rows made dense.
FEW = {"avx512": 24, "avx2": 64, "portable": 24}

# A job's entries, all int64. 0 to 2: what `_team.share` writes, of rows. 3 to 8: columns, bits, bytes a row of bits, values,
# offsets, `Kind`. 9 to 14: x, bytes a row of x, batch, y (float32), bytes a row of y, how many values there are.


@njit(inline="always")
def _some_rows(kind, count, bits, stride, values, offsets, x, xs, columns, batch, y, ys):  # type: ignore[no-untyped-def]
    """Multiply rows with every input; ``kind`` is a constant where this is inlined, so that one case of it is left."""
    tall = 3 if batch >= 8 else 4
    apart = count // tall  # rows multiplied together lie apart, so that what each reads next in memory follows what it read
    for r in range(apart):
        line, begin, to = bits + r * stride, offsets + 8 * r, y + 4 * r
        if batch == 1:
            masked_dot(kind, 4, 1, apart, line, stride, values, begin, x, xs, columns, to, ys)
        elif batch == 4:
            masked_dot(kind, 4, 4, apart, line, stride, values, begin, x, xs, columns, to, ys)
        else:
            for b in range(0, batch - 4, 8):
                masked_dot(kind, 3, 8, apart, line, stride, values, begin, x + b * xs, xs, columns, to + b * ys, ys)
            if batch % 8:
                b = batch - 4
                masked_dot(kind, 3, 4, apart, line, stride, values, begin, x + b * xs, xs, columns, to + b * ys, ys)
    for r in range(apart * tall, count):
        line, begin, to = bits + r * stride, offsets + 8 * r, y + 4 * r
        if batch == 1:
            masked_dot(kind, 1, 1, 0, line, stride, values, begin, x, xs, columns, to, ys)
        else:
            for b in range(0, batch, 4):
                masked_dot(kind, 1, 4, 0, line, stride, values, begin, x + b * xs, xs, columns, to + b * ys, ys)


@_team.compiled(_team.JOB)
def _spread_dot(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    rows, task, columns, bits, stride = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4), load_i64(job, 5)
    values, offsets, kind, x, xs = load_i64(job, 6), load_i64(job, 7), load_i64(job, 8), load_i64(job, 9), load_i64(job, 10)
    batch, y, ys = load_i64(job, 11), load_i64(job, 12), load_i64(job, 13)
    while True:
        low = take(job) * task
        if low >= rows:
            return
        n, line, begin, to = min(task, rows - low), bits + low * stride, offsets + 8 * low, y + 4 * low
        if kind == 3:
            _some_rows(3, n, line, stride, values, begin, x, xs, columns, batch, to, ys)
        elif kind == 2:
            _some_rows(2, n, line, stride, values, begin, x, xs, columns, batch, to, ys)
        elif kind == 1:
            _some_rows(1, n, line, stride, values, begin, x, xs, columns, batch, to, ys)
        else:
            _some_rows(0, n, line, stride, values, begin, x, xs, columns, batch, to, ys)


@njit(inline="always")
def _some_rows_by_eight(kind, count, bits, stride, values, offsets, x, xs, columns, batch, y, ys):  # type: ignore[no-untyped-def]
    """`_some_rows` in AVX2, which has half the registers."""
    tall = 4 if batch == 1 else 2 if batch == 4 else 1
    apart = count // tall
    for r in range(apart):
        line, begin, to = bits + r * stride, offsets + 8 * r, y + 4 * r
        if batch == 1:
            _avx2.masked_dot(kind, 4, 1, apart, line, stride, values, begin, x, xs, columns, to, ys)
        elif batch == 4:
            _avx2.masked_dot(kind, 2, 4, apart, line, stride, values, begin, x, xs, columns, to, ys)
        else:
            for b in range(0, batch, 8):
                _avx2.masked_dot(kind, 1, 8, apart, line, stride, values, begin, x + b * xs, xs, columns, to + b * ys, ys)
    for r in range(apart * tall, count):
        line, begin, to = bits + r * stride, offsets + 8 * r, y + 4 * r
        if batch == 1:
            _avx2.masked_dot(kind, 1, 1, 0, line, stride, values, begin, x, xs, columns, to, ys)
        else:
            _avx2.masked_dot(kind, 1, 4, 0, line, stride, values, begin, x, xs, columns, to, ys)


@njit(inline="always")
def _rows_of_kind(kind, low, count, bits, stride, values, offsets, x, xs, columns, batch, y, ys):  # type: ignore[no-untyped-def]
    line, begin, to = bits + low * stride, offsets + 8 * low, y + 4 * low
    if kind == 2:
        _some_rows_by_eight(2, count, line, stride, values, begin, x, xs, columns, batch, to, ys)
    elif kind == 1:
        _some_rows_by_eight(1, count, line, stride, values, begin, x, xs, columns, batch, to, ys)
    else:
        _some_rows_by_eight(0, count, line, stride, values, begin, x, xs, columns, batch, to, ys)


@_team.compiled(_team.JOB)
def _spread_by_eight(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    rows, task, columns, bits, stride = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4), load_i64(job, 5)
    values, offsets, kind, x, xs = load_i64(job, 6), load_i64(job, 7), load_i64(job, 8), load_i64(job, 9), load_i64(job, 10)
    batch, y, ys, kept = load_i64(job, 11), load_i64(job, 12), load_i64(job, 13), load_i64(job, 14)
    size = 4 if kind == 0 else 2
    room = np.empty(columns + 2 * _avx2.LANES, np.float32)
    while True:
        low = take(job) * task
        if low >= rows:
            return
        n = min(task, rows - low)
        safe = n
        while safe and load_i64(offsets, low + safe) + _avx2.LANES > kept:  # loads of eight would end after the last value
            safe -= 1
        _rows_of_kind(kind, low, safe, bits, stride, values, offsets, x, xs, columns, batch, y, ys)
        if safe < n:  # the last rows, of a copy that has room behind it
            begin, copy = load_i64(offsets, low + safe), np.int64(room.ctypes.data)
            for i in range(load_i64(offsets, low + n) - begin):
                copy_bits(copy, i, values, begin + i, size)
            moved = copy - begin * size
            _rows_of_kind(kind, low + safe, n - safe, bits, stride, moved, offsets, x, xs, columns, batch, y, ys)


@_team.compiled(_team.JOB)
def _portable(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    rows, task, columns, bits, stride = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4), load_i64(job, 5)
    values, offsets, kind, x, xs = load_i64(job, 6), load_i64(job, 7), load_i64(job, 8), load_i64(job, 9), load_i64(job, 10)
    batch, y, ys = load_i64(job, 11), load_i64(job, 12), load_i64(job, 13)
    while True:
        low = take(job) * task
        if low >= rows:
            return
        for r in range(low, min(rows, low + task)):
            for b in range(0, batch, 4):  # four inputs at a time; the last ones again where there are fewer
                b0, b1, b2, b3 = b, min(b + 1, batch - 1), min(b + 2, batch - 1), min(b + 3, batch - 1)
                s0 = s1 = s2 = s3 = np.float32(0)
                at = load_i64(offsets, r)
                for byte in range((columns + 7) // 8):
                    word = load_u8(bits, r * stride + byte)
                    while word:
                        column = byte * 8 + lowest(word)
                        word &= word - 1
                        w = load_float(values, at, kind)
                        at += 1
                        s0 += w * load_f32(x + b0 * xs, column)
                        s1 += w * load_f32(x + b1 * xs, column)
                        s2 += w * load_f32(x + b2 * xs, column)
                        s3 += w * load_f32(x + b3 * xs, column)
                store_f32(y + b3 * ys, r, s3)
                store_f32(y + b2 * ys, r, s2)
                store_f32(y + b1 * ys, r, s1)
                store_f32(y + b0 * ys, r, s0)


@_team.compiled(_tiles.SPREAD)
def _spread(operands, row, to):  # type: ignore[no-untyped-def]
    values, size, columns = load_i64(operands, 0), load_i64(operands, 1), load_i64(operands, 2)
    line = load_i64(operands, 3) + row * load_i64(operands, 4)
    at, avx512 = load_i64(load_i64(operands, 5), row), load_i64(operands, 6)
    done = 0
    if avx512:
        done = columns // 32 * 32
        for word_at in range(columns // 32):
            word = load_i32(line, word_at)
            masked_expand(size, word, values + at * size, to + word_at * 32 * size)
            at += ones(word)
    _tiles.clear(to + done * size, columns - done, size)
    for byte in range(done // 8, (columns + 7) // 8):
        word = load_u8(line, byte)
        while word:
            copy_bits(to, byte * 8 + lowest(word), values, at, size)
            word &= word - 1
            at += 1


def product(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int, kernel: str) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in), by a kernel of `JOBS`."""
    (rows, stride), batch, kept = bits.shape, x.shape[0], values.shape[0]
    avx512 = kernel == "avx512"
    kind = _kind(x.dtype, values.dtype, avx512)
    matrix = columns, bits.data_ptr(), stride, values.data_ptr(), offsets.data_ptr(), int(kind)
    work = kept * batch + rows
    if avx512 and cpu_listed.pays(kept / max(rows * columns, 1), batch, FEW[kernel]):
        return cpu_listed.product(x, rows, columns, kind, work, matrix).to(x.dtype)
    if batch > FEW[kernel]:
        own = bits.data_ptr(), stride, offsets.data_ptr(), int(avx512)
        return _tiles.product(x, _spread, rows, 1, columns, values, *own)
    job, lanes, inputs = JOBS[kernel]
    each = 1 if batch == 1 else min(inputs, 4) if batch <= 4 else inputs
    wide = torch.float32 if kind != Kind.BF16_DOT else torch.bfloat16
    xs = _padded(x if x.dtype == wide else x.to(wide), -batch % each, -columns % lanes)
    y = torch.empty(xs.shape[0], rows, dtype=torch.float32)
    inputs_and_sums = xs.data_ptr(), xs.stride(0) * wide.itemsize, xs.shape[0], y.data_ptr(), rows * 4
    _team.share(job, rows, work, *matrix, *inputs_and_sums, kept)
    return y[:batch].to(x.dtype)


def _padded(x: Tensor, below: int, beside: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, beside, 0, below)) if below or beside else x.contiguous()


# The job of each kernel, how many columns x has a multiple of, and how many inputs where there are more than 4.
JOBS = {"avx512": (_spread_dot, 32, 4), "avx2": (_spread_by_eight, _avx2.LANES, 8), "portable": (_portable, 1, 1)}


def _kind(x: torch.dtype, values: torch.dtype, avx512: bool) -> Kind:
    if avx512 and x == values == torch.bfloat16 and "avx512bf16" in cpu_features():
        return Kind.BF16_DOT
    return _tiles.KINDS[values]
