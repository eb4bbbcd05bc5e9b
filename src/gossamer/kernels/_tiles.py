"""x Wᵀ on the CPU for any layout that can write some of its rows dense: a few at a time.

A layout gives one C function, its `SPREAD`; memory carries only what it stores, and what it spreads is used while it is near.
Up to `FEW` inputs are multiplied with it there and then; more go through a larger tile and torch's dense product.
"""

import threading
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from gossamer.kernels import _team
from gossamer.kernels._choice import has_bfloat16
from gossamer.kernels._simd import Kind, address, call, clear_bits, load_f32, load_float, load_i64, store_f32, take

FEW = 12
TILE_BYTES = 1 << 22  # of a dense tile: the lower it is, the longer torch's product takes by the row

_kept = threading.local()  # the tile of each thread: the pages of a new one would take longer to come than to be filled

# void (operands, unit, to): write the rows of one unit (a row, a row of tiles, a slice) dense, one after another, in the dtype
# of the values. Operands, all int64. 0 to 2: the values, their bytes (2 or 4), columns. From 3 on: the layout's own.
SPREAD = types.void(types.int64, types.int64, types.int64)

KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}


@njit
def clear(to, entries, size):  # type: ignore[no-untyped-def]
    """Set dense entries to zero."""
    for i in range(entries * size // 2):
        clear_bits(to, i, 2)


@njit(fastmath={"reassoc", "contract"})
def _dots(row, columns, x, batch, y, y_stride):  # type: ignore[no-untyped-def]
    """y[b] = row · x[b], summed in any order."""
    for b in range(batch):
        total = np.float32(0)
        for j in range(columns):
            total += load_f32(row, j) * load_f32(x + b * columns * 4, j)
        store_f32(y + b * y_stride, 0, total)


@_team.compiled(_team.JOB)
def _multiply(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    count, task, spread, height, kind = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4), load_i64(job, 5)
    x, batch, y, operands = load_i64(job, 6), load_i64(job, 7), load_i64(job, 8), job + 8 * 9
    size, columns, y_stride = load_i64(operands, 1), load_i64(operands, 2), count * height * 4
    tile = np.empty(height * columns * size, np.uint8)
    wide = np.empty(columns, np.float32)
    while True:
        low = take(job) * task
        if low >= count:
            return
        for unit in range(low, min(count, low + task)):
            rows = np.int64(tile.ctypes.data)  # in the loop: Numba frees an array after it is last named
            call(spread, operands, unit, rows)
            for i in range(height):
                row = rows + i * columns * size
                if kind != 0:  # float32 stays as it is
                    for j in range(columns):
                        wide[j] = load_float(row, j, kind)
                    row = np.int64(wide.ctypes.data)
                _dots(row, columns, x, batch, y + (unit * height + i) * 4, y_stride)


@_team.compiled(_team.JOB)
def _expand(pointer):  # type: ignore[no-untyped-def]
    job = address(pointer)
    count, task, spread, height = load_i64(job, 1), load_i64(job, 2), load_i64(job, 3), load_i64(job, 4)
    first, out, operands = load_i64(job, 5), load_i64(job, 6), job + 8 * 7
    unit_bytes = height * load_i64(operands, 1) * load_i64(operands, 2)
    while True:
        low = take(job) * task
        if low >= count:
            return
        for unit in range(low, min(count, low + task)):
            call(spread, operands, first + unit, out + unit * unit_bytes)


def product(x: Tensor, spread: Any, count: int, height: int, columns: int, values: Tensor, *own: int) -> Tensor:
    """Return x Wᵀ, (batch, count·height), in x's dtype, for x of (batch, columns).

    Args:
        x: the inputs, any float dtype.
        spread: the layout's C function, compiled as `SPREAD`.
        count: how many units there are.
        height: rows of a unit.
        columns: of the matrix.
        values: what is stored of it.
        own: the operands of ``spread`` from 3 on; what they point to has to live until this returns.
    """
    operands = (values.data_ptr(), values.itemsize, columns, *own)
    if len(x) > FEW:
        return _by_tiles(x, spread, count, height, columns, values.dtype, operands)
    wide = x.float().contiguous()
    y = torch.empty(len(x), count * height, dtype=torch.float32)
    kind, work = int(KINDS[values.dtype]), count * height * columns * len(x)
    _team.share(_multiply, count, work, spread.address, height, kind, wide.data_ptr(), len(x), y.data_ptr(), *operands)
    return y.to(x.dtype)


def _room(size: int) -> Tensor:
    found: Tensor | None = getattr(_kept, "room", None)
    if found is None or len(found) < size:
        found = _kept.room = torch.empty(size, dtype=torch.uint8)
    return found[:size]


def _by_tiles(
    x: Tensor, spread: Any, count: int, height: int, columns: int, dtype: torch.dtype, operands: tuple[int, ...]
) -> Tensor:
    """Make some rows dense at a time, and leave the product to the dense one while they are in the cache."""
    rows = max(TILE_BYTES // max(columns * dtype.itemsize, 1) // 64 * 64, 64)
    tall = max(min(rows // height, count), 1)  # units of a tile
    tile = _room(tall * height * columns * dtype.itemsize).view(dtype).view(tall * height, columns)
    y = torch.empty(len(x), count * height, dtype=x.dtype)
    wide = torch.promote_types(x.dtype, dtype)
    slow = wide == torch.float16 or (wide == torch.bfloat16 and not has_bfloat16())  # several times, in torch's product
    x = x.to(torch.float32 if slow else wide)
    for first in range(0, count, tall):
        units = min(tall, count - first)
        work = units * height * columns
        _team.share(_expand, units, work, spread.address, height, first, tile.data_ptr(), *operands)
        y[:, first * height : (first + units) * height] = torch.nn.functional.linear(x, tile[: units * height].to(x.dtype))
    return y
