"""x Wᵀ for a tiled bitmask on the CPU: words are taken in the order in which they lie, each to its lane's next columns."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gossamer.kernels import _team, _tiles
from gossamer.kernels._simd import copy_bits, load_i32, load_i64, load_u8
from gossamer.kernels.tiled.layout import COLUMNS, LANES, ROWS, SHARE


@_team.compiled(_tiles.SPREAD)
def _spread(operands, group, to):  # type: ignore[no-untyped-def]
    values, size, columns = load_i64(operands, 0), load_i64(operands, 1), load_i64(operands, 2)
    bits, begins, across = load_i64(operands, 3), load_i64(operands, 4), load_i64(operands, 5)
    entries = 4 // size
    _tiles.clear(to, ROWS * columns, size)
    reached = np.empty(LANES, np.int64)  # the bit at which each lane is
    for k in range(across):
        block = group * across + k
        at, end = load_i32(begins, block) * entries, load_i32(begins, block + 1) * entries
        reached[:] = 0
        while at < end:
            for lane in range(LANES):
                mask, found = bits + (block * LANES + lane) * (SHARE // 8), 0
                while reached[lane] < SHARE and found < entries:
                    byte, j = divmod(reached[lane], 8)
                    reached[lane] += 1
                    if load_u8(mask, byte) >> j & 1:
                        row = lane // 4 + byte % 2 * (ROWS // 2)
                        copy_bits(to, row * columns + k * COLUMNS + byte // 2 * 32 + lane % 4 * 8 + j, values, at + found, size)
                        found += 1
                at += entries if found else 0


def product(x: Tensor, values: Tensor, bits: Tensor, begins: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    count = -(-shape[0] // ROWS)
    own = bits.data_ptr(), begins.data_ptr(), -(-shape[1] // COLUMNS)
    y = _tiles.product(x, _spread, count, ROWS, shape[1], values, *own)
    return y[:, : shape[0]].contiguous()
