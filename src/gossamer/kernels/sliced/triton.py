"""x Wᵀ for sliced rows on a GPU.

A few inputs: a lane walks chunks of its row and gathers x, which the neighbouring lanes read at about the same place; weights
are read once, in whole lines. Many: the weight is made dense, window by window in shared memory, where entries go to their
columns in any order, and torch multiplies.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels._gpu import aligned, by_dense_rows, multiprocessors, operands, shares
from gossamer.kernels._ptx import put, put_pair, room, take
from gossamer.kernels.sliced import layout

CHUNK, ROWS, STEP = tl.constexpr(layout.CHUNK), tl.constexpr(layout.ROWS), tl.constexpr(layout.STEP)
TALL = tl.constexpr(64)  # rows of a window: two slices
PARTS = tl.constexpr(4)  # lanes that take a row of a window, chunk by chunk
EXPANDING = tl.constexpr(TALL.value * PARTS.value)
WIDE = tl.constexpr(256)  # bytes of a row of a window
STRIDE = tl.constexpr(WIDE.value + 16)  # what does not belong goes into the rest; and it spreads rows over the banks
ONE = 1024  # lanes that a multiprocessor is given for each input, about
FEW = 16  # inputs up to which gathering them costs less than to make the weight dense


def product(
    x: Tensor, values: Tensor, steps: Tensor, bases: Tensor, ends: Tensor, order: Tensor, shape: Sequence[int]
) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    out, columns = shape
    slices, batch, dtype = len(ends) - 1, len(x), x.dtype
    if not len(values) or not batch:
        return x.new_zeros(batch, out)
    x, values = operands(x, values)
    packed = values, aligned(steps), bases, ends
    bits = 8 * len(steps) // len(values)
    small = x.dtype != torch.float32
    with torch.cuda.device(x.device):
        if batch <= (FEW if small else FEW // 4):
            together = min(4 if small else 1, triton.next_power_of_2(batch))
            groups = triton.cdiv(batch, together)
            chunks = -(-len(values) // (slices * layout.ROWS * layout.STEP * layout.CHUNK))  # of a row, on average
            parts = min(ONE * multiprocessors(x.device) // (slices * layout.ROWS), 2 * chunks - 1, 32)
            parts = 1 << max(parts, 4).bit_length() - 1
            if together > 1:  # those inputs side by side, column by column
                x = torch.nn.functional.pad(x, (0, 0, 0, groups * together - batch))
                x = x.view(groups, together, columns).transpose(1, 2).contiguous()
            y = torch.empty(batch, out, dtype=dtype, device=x.device)
            _gather[(groups, slices)](x, *packed, order, y, out, columns, batch, bits, parts, together, num_warps=parts)
            return y

        def expand(dense: Tensor) -> None:
            groups = triton.cdiv(slices, TALL.value // layout.ROWS)
            windows = triton.cdiv(columns * x.itemsize, WIDE.value)
            count = shares(2 * groups, windows, x.device)  # each has twice the threads of other programs
            each, warps = triton.cdiv(windows, count), EXPANDING.value // 32
            _expand[(groups, count)](dense, *packed, order, slices, out, columns, each, bits, num_warps=warps, num_stages=1)

        return by_dense_rows(x, (out, columns), x.dtype, expand).to(dtype)


@triton.jit
def _steps(steps, at, inside, BITS: tl.constexpr):
    """Load the steps of each lane's block, which is the at-th: (lanes, 8), or eight half bytes in a word, (lanes,)."""
    if BITS == 8:
        bytes_ = (steps + at * STEP)[:, None] + tl.arange(0, STEP)[None, :]
        step = tl.load(bytes_, mask=inside[:, None], other=0, eviction_policy="evict_first")
    else:
        step = tl.load(steps.to(tl.pointer_type(tl.uint32)) + at, mask=inside, other=0, eviction_policy="evict_first")
    return step


@triton.jit
def _walk(step, BITS: tl.constexpr):
    """Return how far each entry of a block is from what came before it, (lanes, 8), and how far the last one, (lanes,)."""
    if BITS == 8:
        walk = tl.cumsum(step.to(tl.int32), 1)
        whole = tl.sum(step.to(tl.int32), 1)
    else:  # a product with 0x01010101 adds up the four bytes of a word, from the lowest on
        t = tl.arange(0, STEP)[None, :]
        low = (step & 0x0F0F0F0F) * 0x01010101
        high = ((step >> 4) & 0x0F0F0F0F) * 0x01010101 + (low >> 24) * 0x01010101
        walk = ((tl.where(t < 4, low[:, None], high[:, None]) >> (t % 4 * 8)) & 255).to(tl.int32)
        whole = (high >> 24).to(tl.int32)
    return walk, whole


@triton.jit
def _floats(words, T: tl.constexpr):
    """Return the values that words hold, (lanes, 8), as float32."""
    if T.primitive_bitwidth == 32:
        pairs = words.to(tl.float32, bitcast=True)
    elif T.is_bf16():  # the upper half of a float32
        pairs = tl.join((words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(tl.float32, bitcast=True))
    else:
        pairs = tl.join((words & 0xFFFF).to(tl.uint16).to(T, bitcast=True), (words >> 16).to(tl.uint16).to(T, bitcast=True))
    return tl.reshape(pairs.to(tl.float32), [words.shape[0], STEP])


@triton.jit
def _load(values, steps, block, blocks, r, BITS: tl.constexpr):
    at = block * ROWS + r
    inside = block < blocks
    n: tl.constexpr = STEP * values.dtype.element_ty.primitive_bitwidth // 32
    words = values.to(tl.pointer_type(tl.uint32)) + (at * n)[:, None] + tl.arange(0, n)[None, :]
    w = tl.load(words, mask=inside[:, None], other=0, eviction_policy="evict_first")
    return _floats(w, values.dtype.element_ty), _steps(steps, at, inside, BITS)


@triton.jit(do_not_specialize=["out", "columns", "batch"])
def _gather(
    x, values, steps, bases, ends, order, y, out, columns, batch,
    BITS: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One slice, and 1, 2 or 4 inputs side by side: the lanes of a part walk the chunks of their rows, part by part."""
    T: tl.constexpr = values.dtype.element_ty
    group, s = tl.program_id(0), tl.program_id(1)
    LANES: tl.constexpr = ROWS * PARTS
    begin = tl.load(ends + s)
    blocks = tl.load(ends + s + 1) - begin
    values += begin.to(tl.int64) * (ROWS * STEP)
    steps += begin.to(tl.int64) * (ROWS * BITS)
    bases += (begin // CHUNK + s).to(tl.int64) * ROWS
    inputs = x + group.to(tl.int64) * columns * TOGETHER
    if TOGETHER == 2:
        inputs = inputs.to(tl.pointer_type(tl.uint32))
    elif TOGETHER == 4:
        inputs = inputs.to(tl.pointer_type(tl.uint64))
    r, part = tl.arange(0, LANES) % ROWS, tl.arange(0, LANES) // ROWS
    total0 = tl.zeros([LANES, STEP], tl.float32)
    total1, total2, total3 = total0, total0, total0
    for first in range(0, tl.cdiv(blocks, CHUNK), PARTS):
        chunk = first + part
        column = tl.load(bases + chunk * ROWS + r, mask=chunk * CHUNK < blocks, other=0)
        for i in tl.static_range(CHUNK):
            w, step = _load(values, steps, chunk * CHUNK + i, blocks, r, BITS)
            walk, whole = _walk(step, BITS)
            walk += column[:, None]
            column += whole  # before the gather: so the compiler sees that it may load all of a chunk first
            found = tl.load(inputs + walk)
            total0 += w * _piece(found, 0, T, TOGETHER)
            if TOGETHER >= 2:
                total1 += w * _piece(found, 1, T, TOGETHER)
            if TOGETHER == 4:
                total2 += w * _piece(found, 2, T, TOGETHER)
                total3 += w * _piece(found, 3, T, TOGETHER)
    row = tl.load(order + s * ROWS + tl.arange(0, ROWS))
    b = group * TOGETHER
    y += b.to(tl.int64) * out
    tl.store(y + row, _rows(total0, PARTS).to(y.dtype.element_ty), mask=row < out)
    if TOGETHER >= 2:
        tl.store(y + out + row, _rows(total1, PARTS).to(y.dtype.element_ty), mask=(row < out) & (b + 1 < batch))
    if TOGETHER == 4:
        tl.store(y + 2 * out + row, _rows(total2, PARTS).to(y.dtype.element_ty), mask=(row < out) & (b + 2 < batch))
        tl.store(y + 3 * out + row, _rows(total3, PARTS).to(y.dtype.element_ty), mask=(row < out) & (b + 3 < batch))


@triton.jit
def _piece(found, i: tl.constexpr, T: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the i-th of the inputs that were loaded side by side, as float32."""
    if TOGETHER > 1:
        found = (found >> (16 * i)).to(tl.uint16).to(T, bitcast=True)
    return found.to(tl.float32)


@triton.jit
def _rows(total, PARTS: tl.constexpr):
    return tl.sum(tl.reshape(tl.sum(total, 1), [PARTS, ROWS]), 0)


@triton.jit
def _window(line, values, steps, bases, first, blocks, r, part, left, columns, BITS: tl.constexpr):
    """Put the entries of the window that begins at the column left where they belong in shared memory.

    Args:
        line: the place of each lane's row.
        first: the chunk of each lane's row with the first of these entries.

    Returns:
        The same for the next window.
    """
    SIZE: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    WIDTH: tl.constexpr = WIDE // SIZE
    words = values.to(tl.pointer_type(tl.int32))
    found = tl.zeros([EXPANDING], tl.int32)
    chunk = first + part
    more = 1
    while more > 0:
        column = tl.load(bases + chunk * ROWS + r, mask=chunk * CHUNK < blocks, other=columns)
        live = (chunk * CHUNK < blocks) & (column < left + WIDTH)
        for i in tl.static_range(CHUNK):
            block = chunk * CHUNK + i
            inside = live & (block < blocks)
            at = block * ROWS + r
            walk, whole = _walk(_steps(steps, at, inside, BITS), BITS)
            t = tl.arange(0, STEP * SIZE // 4)[None, :]
            w = tl.load((words + at * (STEP * SIZE // 4))[:, None] + t, mask=inside[:, None], other=0)
            # Entries of other windows go to what is left over at the end of the row; padding is zeros, which stay away.
            away = tl.minimum(((column - left)[:, None] + walk).to(tl.uint32), WIDTH).to(tl.int32)
            place = line[:, None] + away * SIZE
            if SIZE == 4:
                put(place, w)
            else:
                low, high = tl.split(tl.reshape(place, [EXPANDING, STEP // 2, 2]))
                put_pair(low, high, w)
            column += whole
        found += live.to(tl.int32)
        more = tl.max((live & (part == PARTS - 1)).to(tl.int32), 0)
        chunk += PARTS
    # The last of them goes on in the next window.
    return first + _of_row(tl.maximum(tl.sum(tl.reshape(found, [TALL, PARTS]), 1) - 1, 0))


@triton.jit
def _of_row(each):
    return tl.reshape(tl.broadcast_to(each[:, None], [TALL, PARTS]), [EXPANDING])


@triton.jit
def _lanes(values, steps, bases, ends, slices, columns, left, BITS: tl.constexpr):
    """Return what `_window` is given, beginning at the column left, and the places from which `_dense` reads; clear them."""
    lane = tl.arange(0, EXPANDING)
    row, part = lane // PARTS, lane % PARTS
    s, r = tl.program_id(0) * (TALL // ROWS) + row // ROWS, row % ROWS
    begin = tl.load(ends + s, mask=s < slices, other=0)
    blocks = tl.load(ends + s + 1, mask=s < slices, other=0) - begin
    values += begin.to(tl.int64) * (ROWS * STEP)
    steps += begin.to(tl.int64) * (ROWS * BITS)
    bases += (begin // CHUNK + s).to(tl.int64) * ROWS
    first = tl.zeros([EXPANDING], tl.int32)
    if left > 0:  # the last chunk that begins before it
        for t in range(0, tl.max(tl.cdiv(blocks, CHUNK), 0), PARTS):
            chunk = t + part
            base = tl.load(bases + chunk * ROWS + r, mask=chunk * CHUNK < blocks, other=columns)
            first += (base < left).to(tl.int32)
        first = _of_row(tl.maximum(tl.sum(tl.reshape(first, [TALL, PARTS]), 1) - 1, 0))
    place = room()
    piece = tl.arange(0, TALL * WIDE // 16)
    reads = place + piece // (WIDE // 16) * STRIDE + piece % (WIDE // 16) * 16
    take(reads)
    tl.debug_barrier()
    return place + row * STRIDE, values, steps, bases, first, blocks, r, part, reads


@triton.jit
def _dense(reads, T: tl.constexpr):
    """Return what is at some places, (TALL, columns), and clear it."""
    a, b, c, d = take(reads)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    if T.primitive_bitwidth == 16:
        words = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
    return tl.reshape(words, [TALL, WIDE * 8 // T.primitive_bitwidth]).to(T, bitcast=True)


@triton.jit(do_not_specialize=["slices", "out", "each"])
def _expand(dense, values, steps, bases, ends, order, slices, out, columns, each, BITS: tl.constexpr):
    """Some slices, some windows: the rows made dense."""
    T: tl.constexpr = values.dtype.element_ty
    WIDTH: tl.constexpr = WIDE * 8 // T.primitive_bitwidth
    low = tl.program_id(1) * each * WIDTH
    line, values, steps, bases, first, blocks, r, part, reads = _lanes(values, steps, bases, ends, slices, columns, low, BITS)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    row = tl.load(order + row, mask=row < slices * ROWS, other=out)
    to = dense + row.to(tl.int64)[:, None] * columns
    for left in range(low, min(low + each * WIDTH, columns), WIDTH):
        first = _window(line, values, steps, bases, first, blocks, r, part, left, columns, BITS)
        tl.debug_barrier()
        k = left + tl.arange(0, WIDTH)
        tl.store(to + k[None, :], _dense(reads, T), mask=(row < out)[:, None] & (k < columns)[None, :])
        tl.debug_barrier()
