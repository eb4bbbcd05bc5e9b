"""x Wᵀ for tiles on the CPU: a row of tiles is h rows, and each tile goes to its column in them."""

from collections.abc import Sequence

from torch import Tensor

from gossamer.kernels import _team, _tiles
from gossamer.kernels._simd import copy_bits, load_i32, load_i64


@_team.compiled(_tiles.SPREAD)
def _spread(operands, unit, to):  # type: ignore[no-untyped-def]
    values, size, columns = load_i64(operands, 0), load_i64(operands, 1), load_i64(operands, 2)
    h, w, tile_columns, offsets = load_i64(operands, 3), load_i64(operands, 4), load_i64(operands, 5), load_i64(operands, 6)
    _tiles.clear(to, h * columns, size)
    first, last = load_i64(offsets, unit), load_i64(offsets, unit + 1)
    for i in range(h):
        line, source = to + i * columns * size, values + i * w * size
        if w < 16:  # a run of its own for each tile would be too short: the same column of all of them
            for j in range(w):
                for tile in range(first, last):
                    copy_bits(line, load_i32(tile_columns, tile) * w + j, source, tile * h * w + j, size)
        else:
            for tile in range(first, last):
                at = load_i32(tile_columns, tile) * w
                for j in range(w):
                    copy_bits(line, at + j, source, tile * h * w + j, size)


def product(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    _, h, w = values.shape
    return _tiles.product(x, _spread, shape[0] // h, h, shape[1], values, h, w, columns.data_ptr(), offsets.data_ptr())
