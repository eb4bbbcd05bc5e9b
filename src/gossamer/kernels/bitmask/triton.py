"""x Wᵀ for a bitmask on a GPU: a window of W is made dense in registers, and multiplied on the tensor cores.

A thread takes the eight columns of a byte. Their values are somewhere in the row's stretch: as many on as there are bits before
them. Where that is has to be counted, and costs the same for every sparsity; memory carries only what is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda.libdevice import popc

from gossamer.kernels._gpu import FEW, added, aligned, by_dense_rows, operands, partial, shares
from gossamer.kernels._ptx import fetch, spread

TALL = tl.constexpr(64)  # rows of a window
WIDE = tl.constexpr(64)  # columns of a window
BYTES = tl.constexpr(WIDE.value // 8)
LANES = tl.constexpr(TALL.value * BYTES.value)


def product(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    out, dtype = len(bits), x.dtype
    if not len(values) or not len(x):
        return x.new_zeros(len(x), out)
    x, values = operands(x, values)
    bits = aligned(bits)
    groups, windows = triton.cdiv(out, TALL.value), triton.cdiv(columns, WIDE.value)
    whole = columns % WIDE.value == 0
    with torch.cuda.device(x.device):
        # As many as fit on the GPU at a time, and no more: each part has to count where its values begin.
        count = shares(2 * groups, windows, x.device)
        grid, each = (groups, count), triton.cdiv(windows, count)
        if len(x) <= FEW and x.dtype != torch.float32:
            y = partial(count, len(x), out, x)
            wide = max(16, triton.next_power_of_2(len(x)))
            _multiply[grid](x, values, bits, offsets, y, out, columns, len(x), each, whole, wide, num_warps=4, num_stages=1)
            return added(y, dtype)

        def expand(dense: Tensor) -> None:
            _expand[grid](dense, values, bits, offsets, out, columns, each, whole, num_warps=4, num_stages=1)

        return by_dense_rows(x, (out, columns), x.dtype, expand).to(dtype)


@triton.jit
def _mask(bits, r, window, live, columns, WHOLE: tl.constexpr):
    """Return, for each lane, the 64 bits of its row in a window, int64."""
    stride = tl.cdiv(columns, 8)
    if WHOLE:
        return tl.load(bits.to(tl.pointer_type(tl.int64)) + r.to(tl.int64) * (stride // 8) + window, mask=live, other=0)
    byte = tl.arange(0, LANES) % BYTES
    there = live & (window * BYTES + byte < stride)
    own = tl.load(bits + r.to(tl.int64) * stride + window * BYTES + byte, mask=there, other=0).to(tl.int64) << (byte * 8)
    word = tl.sum(tl.reshape(own, [TALL, BYTES]), 1)
    return tl.reshape(tl.broadcast_to(word[:, None], [TALL, BYTES]), [LANES])


@triton.jit
def _start(bits, offsets, out, columns, window, WHOLE: tl.constexpr):
    """Return, for each lane, its row, whether there is one, and where the row's values from a window on begin."""
    r = tl.program_id(0) * TALL + tl.arange(0, LANES) // BYTES
    lane = tl.arange(0, LANES) % BYTES
    line = bits + r.to(tl.int64) * tl.cdiv(columns, 8)
    before = tl.zeros([LANES], tl.int32)
    if WHOLE:  # the lanes of a row count a window each
        for start in range(0, window, BYTES * 4):
            for i in tl.static_range(4):
                at = start + i * BYTES + lane
                words = line.to(tl.pointer_type(tl.int64)) + at
                before += popc(tl.load(words, mask=(r < out) & (at < window), other=0))
    else:
        for at in range(0, window * BYTES, BYTES):
            before += popc(tl.load(line + at + lane, mask=r < out, other=0).to(tl.int32))
    before = tl.sum(tl.reshape(before, [TALL, BYTES]), 1)
    before = tl.reshape(tl.broadcast_to(before[:, None], [TALL, BYTES]), [LANES])
    return r, r < out, tl.load(offsets + r, mask=r < out, other=0) + before


@triton.jit
def _ahead(values, word, at):
    """Return, of each lane, its byte of the mask, where that byte's values are, and where the row's next window begins."""
    shift = (tl.arange(0, LANES) % BYTES * 8).to(tl.int64)
    below = (tl.full([LANES], 1, tl.int64) << shift) - 1
    return (word >> shift).to(tl.int32) & 255, (values + (at + popc(word & below))).to(tl.int64), at + popc(word)


@triton.jit
def _dense(words, place, byte, T: tl.constexpr):
    """Return a window, (TALL, WIDE)."""
    a, b, c, d = spread(words, place, byte)
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, [TALL, WIDE]).to(T, bitcast=True)


@triton.jit(do_not_specialize=["out", "batch", "each"])
def _multiply(
    x, values, bits, offsets, y, out, columns, batch, each, WHOLE: tl.constexpr, BATCH: tl.constexpr
):  # fmt: skip
    """Up to 64 inputs, some rows, some windows: a part of their sums, (parts, batch, out)."""
    T: tl.constexpr = values.dtype.element_ty
    low = tl.program_id(1) * each
    high = min(low + each, tl.cdiv(columns, WIDE))
    r, live, at = _start(bits, offsets, out, columns, low, WHOLE)
    # The values of a window and the mask of the next one are on their way while the window before is multiplied.
    byte, place, at = _ahead(values, _mask(bits, r, low, live & (low < high), columns, WHOLE), at)
    words = fetch(place, byte)
    mask = _mask(bits, r, low + 1, live & (low + 1 < high), columns, WHOLE)
    b = tl.arange(0, BATCH)
    total = tl.zeros([TALL, BATCH], tl.float32)
    for window in range(low, high):
        k = window * WIDE + tl.arange(0, WIDE)
        inputs = tl.load(x + b[:, None] * columns + k[None, :], mask=(b < batch)[:, None] & (k < columns)[None, :], other=0.0)
        next_byte, next_place, at = _ahead(values, mask, at)
        next_words = fetch(next_place, next_byte)
        mask = _mask(bits, r, window + 2, live & (window + 2 < high), columns, WHOLE)
        total = tl.dot(_dense(words, place, byte, T), tl.trans(inputs), total)
        words, place, byte = next_words, next_place, next_byte
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    to = (tl.program_id(1) * batch + b).to(tl.int64)[None, :] * out + row[:, None]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(row < out)[:, None] & (b < batch)[None, :])


@triton.jit(do_not_specialize=["out", "each"])
def _expand(dense, values, bits, offsets, out, columns, each, WHOLE: tl.constexpr):
    """Some rows, some windows: made dense."""
    T: tl.constexpr = values.dtype.element_ty
    low = tl.program_id(1) * each
    r, live, at = _start(bits, offsets, out, columns, low, WHOLE)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    to = dense + row.to(tl.int64)[:, None] * columns
    j = tl.arange(0, 8)[None, :]
    for window in range(low, min(low + each, tl.cdiv(columns, WIDE))):
        byte, place, at = _ahead(values, _mask(bits, r, window, live, columns, WHOLE), at)
        if T.primitive_bitwidth == 16:
            w = _dense(fetch(place, byte), place, byte, T)
        else:
            bit = (byte[:, None] >> j) & 1
            rank = tl.cumsum(bit, 1) - bit
            w = tl.load(place.to(tl.pointer_type(T))[:, None] + rank, mask=bit != 0, other=0.0)
            w = tl.reshape(w, [TALL, WIDE])
        k = window * WIDE + tl.arange(0, WIDE)
        tl.store(to + k[None, :], w, mask=(row < out)[:, None] & (k < columns)[None, :])
