"""x Wᵀ for a bitmask on the CPU: values are spread to their columns in registers, so memory carries only what is kept.

Up to `FEW` inputs go through a product of rows with the mask; more go through a tile of rows made dense.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gossamer.kernels import _team, _tiles
from gossamer.kernels._avx512 import list_columns, listed_dot, masked_dot, masked_expand
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

FEW = 24  # inputs that are multiplied with a row spread in registers; more, with rows made dense
MANY = 64  # and those that are multiplied with its kept values alone, where these are few

# A job's entries, all int64. 0 to 2: what `_team.share` writes, of rows. 3 to 8: columns, bits, bytes a row of bits, values,
# offsets, `Kind`. 9 to 13: x, bytes a row of x, batch, y (float32), bytes a row of y.


@njit(inline="always")
def _some_rows(kind, count, bits, stride, values, offsets, x, xs, columns, batch, y, ys):  # type: ignore[no-untyped-def]
    """Multiply rows with every input; ``kind`` is a constant where this is inlined, so that one case of it is left."""
    r = 0
    while r < count:
        line, begin, to = bits + r * stride, offsets + 8 * r, y + 4 * r
        b = 0
        if batch >= 8 and count - r >= 3:
            tall = 3
            while batch - b >= 8:
                masked_dot(kind, 3, 8, line, stride, values, begin, x + b * xs, xs, columns, to + b * ys, ys)
                b += 8
        elif batch >= 4 and count - r >= 4:
            tall = 4
            while batch - b >= 4:
                masked_dot(kind, 4, 4, line, stride, values, begin, x + b * xs, xs, columns, to + b * ys, ys)
                b += 4
        else:
            tall = 1
        for i in range(tall):  # the inputs that are left
            c = b
            while c < batch:
                one, at = line + i * stride, to + 4 * i + c * ys
                if batch - c >= 4:
                    masked_dot(kind, 1, 4, one, stride, values, begin + 8 * i, x + c * xs, xs, columns, at, ys)
                    c += 4
                else:
                    masked_dot(kind, 1, 1, one, stride, values, begin + 8 * i, x + c * xs, xs, columns, at, ys)
                    c += 1
        r += tall


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


@_team.compiled(_team.JOB)
def _listed_dot(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    rows, task, columns, bits, stride = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4), load_i64(job, 5)
    values, offsets, kind, x, vectors = (
        load_i64(job, 6),
        load_i64(job, 7),
        load_i64(job, 8),
        load_i64(job, 9),
        load_i64(job, 10),
    )
    y, size, wide = load_i64(job, 11), 4 if kind == 0 else 2, vectors * 64
    room = np.empty(columns + 32, np.uint16)
    while True:
        low = take(job) * task
        if low >= rows:
            return
        for r in range(low, min(rows, low + task)):
            listed = np.int64(room.ctypes.data)  # in the loop: Numba frees an array after it is last named
            line, to = bits + r * stride, listed
            for i in range(stride // 4):
                word = load_i32(line, i)
                list_columns(word, 32 * i, to)
                to += 2 * ones(word)
            for i in range(stride // 4 * 4, stride):
                word = load_u8(line, i)
                list_columns(word, 8 * i, to)
                to += 2 * ones(word)
            v = 0
            while v < vectors:
                some = 4 if vectors - v >= 4 else 2 if vectors - v >= 2 else 1
                begin = values + load_i64(offsets, r) * size
                listed_dot(kind, some, begin, listed, (to - listed) // 2, x + 64 * v, wide, y + r * wide + 64 * v)
                v += some


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


def product(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int, *, avx512: bool) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    rows, stride = bits.shape
    kind = _kind(x.dtype, values.dtype, avx512)
    matrix = columns, bits.data_ptr(), stride, values.data_ptr(), offsets.data_ptr(), int(kind)
    work = len(values) * len(x) + rows
    if avx512 and columns <= 1 << 16 and _few_kept(len(values) / max(rows * columns, 1), len(x)):
        vectors = -(-len(x) // 16)
        turned = torch.zeros(columns, 16 * vectors, dtype=torch.float32)
        turned[:, : len(x)] = x.T
        y = torch.empty(rows, 16 * vectors, dtype=torch.float32)
        _team.share(_listed_dot, rows, work, *matrix, turned.data_ptr(), vectors, y.data_ptr())
        return y[:, : len(x)].T.to(x.dtype, memory_format=torch.contiguous_format)
    if len(x) > FEW:
        own = bits.data_ptr(), stride, offsets.data_ptr(), int(avx512)
        return _tiles.product(x, _spread, rows, 1, columns, values, *own)
    wide = torch.float32 if kind != Kind.BF16_DOT else torch.bfloat16
    padded = torch.nn.functional.pad(x.to(wide), (0, -columns % 32 if avx512 else 0)).contiguous()
    y = torch.empty(len(x), rows, dtype=torch.float32)
    inputs = padded.data_ptr(), padded.stride(0) * wide.itemsize, len(x), y.data_ptr(), rows * 4
    _team.share(_spread_dot if avx512 else _portable, rows, work, *matrix, *inputs)
    return y.to(x.dtype)


def _few_kept(density: float, batch: int) -> bool:
    """Whether it is less work to walk the kept values than the columns.

    Measured in cycles for 32 columns of a row: about 2.6 for each kept value and 16 inputs, against 1.5 for each input.
    """
    return 4 <= batch <= MANY and 2.6 * 32 * density * -(-batch // 16) < 1.5 * batch


def _kind(x: torch.dtype, values: torch.dtype, avx512: bool) -> Kind:
    if avx512 and x == values == torch.bfloat16 and "avx512bf16" in cpu_features():
        return Kind.BF16_DOT
    return _tiles.KINDS[values]
