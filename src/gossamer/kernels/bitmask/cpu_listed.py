"""x Wᵀ for a bitmask on the CPU by a list of what is kept: where little is, or for many inputs, it costs less than the columns.

A thread lists the columns of some rows, then goes through x in blocks of columns and inputs, each near while all rows use it.
"""

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels import _team
from gossamer.kernels._avx512_listed import list_columns, listed_dot
from gossamer.kernels._simd import Kind, address, load_i32, load_i64, load_u8, ones, prefetch, store_f32, take

# Columns of a block, by vectors of 8 inputs: in a wider one x is no longer near, in a narrower one a row has too few values.
BLOCK = {1: 2048, 2: 1024, 4: 512}
ROWS = 32  # listed together, for each group of inputs: more of them share what is fetched of x
MOST_ROWS = 256

# Cycles, measured: a list of 32 columns; a value with 8·vectors inputs; 32 columns of a row spread, with 8 inputs.
LIST, VALUE, SPREAD = 5, {1: 1.7, 2: 2.2, 4: 3.0}, 11.5


@_team.compiled(_team.JOB)
def _multiply(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)  # entries 0 to 2: what `_team.share` writes, of units of ``height`` rows; from 3 on: as below
    count, task, columns, bits, stride = (
        load_i64(job, 1),
        load_i64(job, 2),
        load_i64(job, 3),
        load_i64(job, 4),
        load_i64(job, 5),
    )
    values, offsets, kind, x, vectors = (
        load_i64(job, 6),
        load_i64(job, 7),
        load_i64(job, 8),
        load_i64(job, 9),
        load_i64(job, 10),
    )
    groups, y, rows, height, block = (
        load_i64(job, 11),
        load_i64(job, 12),
        load_i64(job, 13),
        load_i64(job, 14),
        load_i64(job, 15),
    )
    size, x_size = 4 if kind == 0 else 2, 2 if kind == 3 else 4
    column_bytes, sums_bytes, blocks = 8 * vectors * x_size, 32 * vectors, (columns + block - 1) // block
    room = np.empty(height * columns + 32, np.uint16)
    ends = np.empty(height * blocks + 1, np.int64)
    while True:
        low = take(job) * task
        if low >= count:
            return
        for unit in range(low, min(count, low + task)):
            first, tall = unit * height, min(height, rows - unit * height)
            start, listed = load_i64(offsets, first), 0
            places = np.int64(room.ctypes.data)  # in the loop: Numba frees an array after it is last named
            for r in range(tall):
                line = bits + (first + r) * stride
                for i in range(start + listed, load_i64(offsets, first + r + 1), 64 // size):
                    prefetch(values + i * size)  # the blocks will read them in pieces, which the processor does not foresee
                for k in range(blocks):
                    ends[r * blocks + k] = listed
                    begin, end = k * block // 8, min((k + 1) * block // 8, stride)
                    for i in range(begin // 4, end // 4):
                        word = load_i32(line, i)
                        list_columns(word, 32 * i - 8 * begin, column_bytes // 8, places + 2 * listed)
                        listed += ones(word)
                    for i in range(end // 4 * 4, end):
                        word = load_u8(line, i)
                        list_columns(word, 8 * (i - begin), column_bytes // 8, places + 2 * listed)
                        listed += ones(word)
            ends[tall * blocks] = listed
            for g in range(groups):
                for i in range(tall * vectors * 8):
                    store_f32(y + (g * rows + first) * sums_bytes, i, np.float32(0))
            for k in range(blocks):
                nothing = (columns - k * block) * column_bytes
                for g in range(groups):
                    near, to = x + (g * (columns + 1) + k * block) * column_bytes, y + (g * rows + first) * sums_bytes
                    for r in range(tall):
                        begin, many = ends[r * blocks + k], ends[r * blocks + k + 1] - ends[r * blocks + k]
                        here, there = values + (start + begin) * size, to + r * sums_bytes
                        listed_dot(kind, vectors, here, places + 2 * begin, many, near, nothing, there)


def product(x: Tensor, rows: int, columns: int, kind: Kind, work: int, matrix: tuple[int, ...]) -> Tensor:
    """Return x Wᵀ in float32, (batch, rows); ``matrix`` are entries 3 to 8 of the job, whose memory has to live until then."""
    groups, vectors = _groups(len(x))
    inputs = 8 * vectors
    wide = torch.bfloat16 if kind == Kind.BF16_DOT else torch.float32
    padded = torch.nn.functional.pad(x.to(wide), (0, 1, 0, groups * inputs - len(x)))  # one more column, of zeros
    turned = padded.view(groups, inputs, columns + 1).transpose(1, 2).contiguous()
    y = torch.empty(groups, rows, inputs, dtype=torch.float32)
    for_each = max(rows // (4 * torch.get_num_threads()), 16)  # so that every thread has something to do
    height = min(ROWS * groups, MOST_ROWS, for_each)
    sizes = vectors, groups, y.data_ptr(), rows, height, BLOCK[vectors]
    _team.share(_multiply, -(-rows // height), work, *matrix, turned.data_ptr(), *sizes)
    if kind == Kind.BF16_DOT:  # inputs 0 to 3 of every 8 stand before the others
        return y.view(groups, rows, 2, vectors, 4).permute(0, 3, 2, 4, 1).reshape(groups * inputs, rows)[: len(x)]
    return y.transpose(1, 2).reshape(groups * inputs, rows)[: len(x)]


def pays(density: float, batch: int, spread: int) -> bool:
    """Whether it takes less time than rows spread: in registers up to ``spread`` inputs, dense for more."""
    groups, vectors = _groups(batch)
    if batch > spread:
        return density < 0.48 or batch <= 64
    return batch > 4 and LIST + 32 * density * VALUE[vectors] * groups < SPREAD * -(-batch // 8)


def _groups(batch: int) -> tuple[int, int]:
    """Return how many groups of inputs there are, and how many vectors of 8 a group has."""
    vectors = 1 if batch <= 8 else 2 if batch <= 16 else 4
    return -(-batch // (8 * vectors)), vectors
