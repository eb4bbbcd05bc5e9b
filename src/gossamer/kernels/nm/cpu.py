"""x Wᵀ for n of every m on the CPU: each value goes to the column its position tells."""

from torch import Tensor

from gossamer.kernels import _team, _tiles
from gossamer.kernels._simd import copy_bits, load_i64, load_u8


@_team.compiled(_tiles.SPREAD)
def _spread(operands, row, to):  # type: ignore[no-untyped-def]
    values, size, columns = load_i64(operands, 0), load_i64(operands, 1), load_i64(operands, 2)
    n, m, bits = load_i64(operands, 3), load_i64(operands, 4), load_i64(operands, 5)
    kept = columns // m * n
    line = load_i64(operands, 6) + row * ((kept * bits + 7) // 8)
    _tiles.clear(to, columns, size)
    group = within = 0
    for i in range(kept):
        position = (load_u8(line, (i * bits) >> 3) >> ((i * bits) & 7)) & ((1 << bits) - 1)
        copy_bits(to, group + position, values, row * kept + i, size)
        within += 1
        if within == n:
            within = 0
            group += m


def product(x: Tensor, values: Tensor, positions: Tensor, n: int, m: int) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    bits = next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)
    return _tiles.product(x, _spread, len(values), 1, x.shape[1], values, n, m, bits, positions.data_ptr())
