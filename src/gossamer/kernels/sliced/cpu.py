"""x Wᵀ for sliced rows on the CPU: a slice is spread block by block, in the order in which it is stored."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels import _team, _tiles
from gossamer.kernels._simd import copy_bits, load_i32, load_i64, load_u8, load_u16
from gossamer.kernels.sliced.layout import CHUNK, ROWS, STEP


@_team.compiled(_tiles.SPREAD)
def _spread(operands, place, to):  # type: ignore[no-untyped-def]
    values, size, columns = load_i64(operands, 0), load_i64(operands, 1), load_i64(operands, 2)
    steps, bases, ends, half = load_i64(operands, 3), load_i64(operands, 4), load_i64(operands, 5), load_i64(operands, 6)
    _tiles.clear(to, ROWS * columns, size)
    column = np.empty(ROWS, np.int64)  # where each row is
    begin = load_i32(ends, place)
    for block in range(begin, load_i32(ends, place + 1)):
        chunk, opening = divmod(block - begin, CHUNK)
        for lane in range(ROWS):
            if opening == 0:
                column[lane] = load_i32(bases, (begin // CHUNK + place + chunk) * ROWS + lane)
            row = to + lane * columns * size
            at, here = (block * ROWS + lane) * STEP, column[lane]
            for t in range(STEP):
                if half:
                    here += (load_u8(steps, at // 2 + t % 4) >> (t // 4 * 4)) & 15
                else:
                    here += load_u8(steps, at + t)
                # Padding is zeros at a column that may hold a value.
                if (load_u16(values, at + t) if size == 2 else load_i32(values, at + t)) != 0:
                    copy_bits(row, here, values, at + t, size)
            column[lane] = here


def product(
    x: Tensor, values: Tensor, steps: Tensor, bases: Tensor, ends: Tensor, order: Tensor, shape: Sequence[int]
) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    own = steps.data_ptr(), bases.data_ptr(), ends.data_ptr(), int(len(steps) < len(values))
    y = _tiles.product(x, _spread, len(ends) - 1, ROWS, shape[1], values, *own)
    return torch.empty(len(x), shape[0], dtype=x.dtype).index_copy_(1, order[: shape[0]].long(), y[:, : shape[0]])
