"""x Wᵀ for n of every m on a GPU.

2:4 in 16 bits is what all is built for: four inputs of a group are one 64-bit word, out of which a shift takes the one that a
value is multiplied with, and into which two shifts put a group's two values. Other patterns gather their inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels._gpu import FEW, added, aligned, by_dense_rows, operands, partial, shares

TALL = tl.constexpr(64)  # rows of a window
WIDE = tl.constexpr(128)  # columns of a window
UNITS = tl.constexpr(WIDE.value // 16)  # of 16 columns: what a thread takes, 8 values and 16 bits of positions
LANES = tl.constexpr(TALL.value * UNITS.value)
SOME = tl.constexpr(4)  # rows, and
MANY = tl.constexpr(256)  # values or columns, that a program of any n:m takes at a time


def product(x: Tensor, values: Tensor, positions: Tensor, n: int, m: int) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    out, kept = values.shape
    columns, dtype = kept // n * m, x.dtype
    if not values.numel() or not len(x):
        return x.new_zeros(len(x), out)
    x, values = operands(x, values)
    packed = values, aligned(positions)
    small = x.dtype != torch.float32
    with torch.cuda.device(x.device):
        if (n, m) == (2, 4) and small and kept % 8 == 0:
            return _two_of_four(x, *packed, out, columns)
        bits = next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)
        rows = triton.cdiv(out, SOME.value)
        if len(x) <= 4:
            y = torch.empty(len(x), out, dtype=dtype, device=x.device)
            _gather[(rows, len(x))](x, *packed, y, out, kept, columns, n, m, bits)
            return y

        def expand(dense: Tensor) -> None:
            _expand[(rows, triton.cdiv(columns, MANY.value))](dense, *packed, out, kept, columns, n, m, bits)

        return by_dense_rows(x, (out, columns), x.dtype, expand).to(dtype)


def _two_of_four(x: Tensor, values: Tensor, positions: Tensor, out: int, columns: int) -> Tensor:
    units = columns // 16
    if len(x) == 1:
        y = torch.empty(1, out, dtype=x.dtype, device=x.device)
        across = min(128, max(32, triton.next_power_of_2(units)))
        tall = 512 // across  # four units a thread: with two, fewer bytes are on their way at a time
        _gather_pairs[(triton.cdiv(out, tall),)](x, values, positions, y, out, units, tall, across, num_warps=4)
        return y
    groups, windows = triton.cdiv(out, TALL.value), triton.cdiv(units, UNITS.value)
    count = shares(groups, windows, x.device)
    grid, each = (groups, count), triton.cdiv(windows, count)
    if len(x) <= FEW:
        y = partial(count, len(x), out, x)
        wide = max(16, triton.next_power_of_2(len(x)))
        _multiply[grid](x, values, positions, y, out, units, len(x), each, wide, num_warps=4, num_stages=1)
        return added(y, x.dtype)

    def expand(dense: Tensor) -> None:
        _expand_pairs[grid](dense, values, positions, out, units, each, num_warps=4, num_stages=1)

    return by_dense_rows(x, (out, columns), x.dtype, expand)


# Where a row begins is unknown to the compiler, which would otherwise have a thread load the positions of several units at a
# time, and exchange them afterwards.
@triton.jit(do_not_specialize=["out", "units"])
def _gather_pairs(x, values, positions, y, out, units, ROWS: tl.constexpr, ACROSS: tl.constexpr):
    """2:4, one input: some rows of so many units at a time."""
    T: tl.constexpr = values.dtype.element_ty
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = r.to(tl.int64)[:, None] * units
    live = (r < out)[:, None]
    quads = x.to(tl.pointer_type(tl.int64))
    words = positions.to(tl.pointer_type(tl.uint16))
    shift = (tl.arange(0, 8) * 2)[None, None, :]
    two = tl.arange(0, 2)[None, :]
    total = tl.zeros([ROWS, ACROSS], tl.float32)
    for k in range(0, units, ACROSS):
        unit = k + tl.arange(0, ACROSS)
        there = unit < units
        place = tl.load(words + line + unit[None, :], mask=live & there[None, :], other=0, eviction_policy="evict_first")
        at = k * 8 + tl.arange(0, ACROSS * 8)[None, :]
        w = tl.load(values + line * 8 + at, mask=live & (at < units * 8), other=0.0, eviction_policy="evict_first")
        quad = quads + (unit * 4)[:, None] + two
        first = tl.load(quad, mask=there[:, None], other=0)
        last = tl.load(quad + 2, mask=there[:, None], other=0)
        inputs = tl.reshape(tl.permute(tl.join(first, last), [0, 2, 1]), [1, ACROSS, 4, 1])
        inputs = tl.reshape(tl.broadcast_to(inputs, [1, ACROSS, 4, 2]), [1, ACROSS, 8])
        which = ((place.to(tl.int32)[:, :, None] >> shift) & 3) * 16
        chosen = (inputs >> which.to(tl.int64)).to(tl.int16).to(T, bitcast=True)
        total += tl.sum(tl.reshape(w, [ROWS, ACROSS, 8]).to(tl.float32) * chosen.to(tl.float32), 2)
    tl.store(y + r, tl.sum(total, 1).to(T), mask=r < out)


@triton.jit
def _lanes(values, positions, out, units):
    """Return each lane's unit in a window, whether it has a row, and where the row's pairs and positions begin."""
    lane = tl.arange(0, LANES)
    r = tl.program_id(0) * TALL + lane // UNITS
    pairs = values.to(tl.pointer_type(tl.int32)) + r.to(tl.int64) * (units * 4)
    return lane % UNITS, r < out, pairs, positions.to(tl.pointer_type(tl.uint16)) + r.to(tl.int64) * units


@triton.jit
def _load(pairs, words, unit, inside):
    """Return what is stored of each lane's unit: pairs of values, (lanes, 4), and positions, (lanes,)."""
    at = (pairs + unit * 4)[:, None] + tl.arange(0, 4)[None, :]
    pair = tl.load(at, mask=inside[:, None], other=0, eviction_policy="evict_first")
    return pair, tl.load(words + unit, mask=inside, other=0, eviction_policy="evict_first").to(tl.int32)


@triton.jit
def _dense(pair, word, T: tl.constexpr):
    """Return a window, (TALL, WIDE)."""
    place = word[:, None] >> (tl.arange(0, 4) * 4)[None, :]
    first, second = (pair & 0xFFFF).to(tl.int64), (pair.to(tl.uint32) >> 16).to(tl.int64)
    four = (first << ((place & 3) * 16).to(tl.int64)) | (second << (((place >> 2) & 3) * 16).to(tl.int64))
    two = tl.join(four.to(tl.int32), (four >> 32).to(tl.int32))
    halves = tl.join((two & 0xFFFF).to(tl.int16), (two >> 16).to(tl.int16))
    return tl.reshape(halves, [TALL, WIDE]).to(T, bitcast=True)


@triton.jit(do_not_specialize=["out", "units", "batch", "each"])
def _multiply(x, values, positions, y, out, units, batch, each, BATCH: tl.constexpr):
    """2:4, up to 64 inputs: some rows, some windows; a part of their sums, (parts, batch, out)."""
    T: tl.constexpr = values.dtype.element_ty
    lane, live, pairs, words = _lanes(values, positions, out, units)
    low = tl.program_id(1) * each * UNITS
    high = min(low + each * UNITS, units)
    pair, word = _load(pairs, words, low + lane, live & (low + lane < high))
    b = tl.arange(0, BATCH)
    total = tl.zeros([TALL, BATCH], tl.float32)
    for unit in range(low, high, UNITS):
        k = unit * 16 + tl.arange(0, WIDE)
        at = x + b[:, None] * (units * 16) + k[None, :]
        inputs = tl.load(at, mask=(b < batch)[:, None] & (k < units * 16)[None, :], other=0.0)
        window = _dense(pair, word, T)
        after = unit + UNITS + lane
        pair, word = _load(pairs, words, after, live & (after < high))  # on its way while this one is multiplied
        total = tl.dot(window, tl.trans(inputs), total)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    to = (tl.program_id(1) * batch + b).to(tl.int64)[None, :] * out + row[:, None]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(row < out)[:, None] & (b < batch)[None, :])


@triton.jit(do_not_specialize=["out", "units", "each"])
def _expand_pairs(dense, values, positions, out, units, each):
    """2:4: some rows, some windows, made dense."""
    lane, live, pairs, words = _lanes(values, positions, out, units)
    low = tl.program_id(1) * each * UNITS
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    to = dense + row.to(tl.int64)[:, None] * (units * 16)
    for unit in range(low, min(low + each * UNITS, units), UNITS):
        pair, word = _load(pairs, words, unit + lane, live & (unit + lane < units))
        k = unit * 16 + tl.arange(0, WIDE)
        window = _dense(pair, word, values.dtype.element_ty)
        tl.store(to + k[None, :], window, mask=(row < out)[:, None] & (k < units * 16)[None, :])


@triton.jit
def _position(positions, r, k, inside, kept, BITS: tl.constexpr):
    """Return the place in its group of value k of row r."""
    byte = positions + r.to(tl.int64) * tl.cdiv(kept * BITS, 8) + k * BITS // 8
    return (tl.load(byte, mask=inside, other=0).to(tl.int32) >> (k * BITS % 8)) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["out", "kept", "columns"])
def _gather(
    x, values, positions, y, out, kept, columns, n: tl.constexpr, m: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Any n:m, one input, some rows."""
    r = (tl.program_id(0) * SOME + tl.arange(0, SOME))[:, None]
    b = tl.program_id(1).to(tl.int64)
    total = tl.zeros([SOME, MANY], tl.float32)
    for start in range(0, kept, MANY):
        k = start + tl.arange(0, MANY)[None, :]
        inside = (r < out) & (k < kept)
        column = k // n * m + _position(positions, r, k, inside, kept, BITS)
        w = tl.load(values + r.to(tl.int64) * kept + k, mask=inside, other=0.0).to(tl.float32)
        total += w * tl.load(x + b * columns + column, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0) * SOME + tl.arange(0, SOME)
    tl.store(y + b * out + row, tl.sum(total, 1).to(y.dtype.element_ty), mask=row < out)


@triton.jit(do_not_specialize=["out", "kept", "columns"])
def _expand(
    dense, values, positions, out, kept, columns, n: tl.constexpr, m: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Any n:m: some rows and columns, made dense; each looks through the values of its group."""
    r = (tl.program_id(0) * SOME + tl.arange(0, SOME))[:, None]
    c = (tl.program_id(1) * MANY + tl.arange(0, MANY))[None, :]
    inside = (r < out) & (c < columns)
    w = tl.zeros([SOME, MANY], dense.dtype.element_ty)
    for i in range(n):
        k = c // m * n + i
        here = inside & (_position(positions, r, k, inside, kept, BITS) == c % m)
        w = tl.where(here, tl.load(values + r.to(tl.int64) * kept + k, mask=here, other=0.0), w)
    tl.store(dense + r.to(tl.int64) * columns + c, w, mask=inside)
