"""x Wᵀ for a tiled bitmask on a GPU: what is stored is made the tensor cores' operand where it is used, in registers.

A warp copies a block's words to its columns of shared memory; its lanes then take them in the order of their own bits, and
multiply at once. No lane waits for another, memory is read once, in whole lines, and carries only what is kept.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda.libdevice import popc

from gossamer.kernels._gpu import FEW, added, aligned, multiprocessors, partial
from gossamer.kernels.tiled import layout
from gossamer.kernels.tiled._ptx import column, fill, four, load, multiply, one, store, wait

ROWS, COLUMNS, SHARE = tl.constexpr(layout.ROWS), tl.constexpr(layout.COLUMNS), tl.constexpr(layout.SHARE)
WARPS = tl.constexpr(4)
WARPS32 = 2  # where entries are of 32 bits: columns are twice as deep, and the memory has an end
STEPS = tl.constexpr(layout.COLUMNS // 32)
RESIDENT = 7  # programs that a multiprocessor runs at a time
REGISTERS = 72  # of a thread, so that it can
MOST = 512  # inputs that `_prompt` multiplies, where it runs; for more, making the weight dense first is faster


def product(x: Tensor, values: Tensor, bits: Tensor, begins: Tensor, levels: int, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), in x's dtype, for x of (batch, in)."""
    out, columns = shape
    down, across = layout.blocks((out, columns))
    if not len(x) or not len(values):
        return x.new_zeros(len(x), out)
    levels = -(-levels // 4) * 4  # few different ones, each of which is compiled
    with torch.cuda.device(x.device):
        half = values.itemsize == 2
        if FEW < len(x) <= MOST and x.dtype == values.dtype and half and _has_prompt(x.device):
            from gossamer.kernels.tiled import _prompt

            return _prompt.product(x, values, bits, begins, levels, out)
        warps = WARPS.value if half else WARPS32
        # All programs run at a time: another few, after the others, would take as long as these.
        count = max(1, min(-(-across // warps), RESIDENT * multiprocessors(x.device) // down))
        if len(x) > FEW or x.dtype != values.dtype or not half:
            wide = -(-columns // 8) * 8  # whole stores
            dense = torch.empty(out, wide, dtype=values.dtype, device=x.device)
            _expand[(down, count)](
                dense, bits, values, begins, out, wide, across, levels, warps, num_warps=warps, maxnreg=REGISTERS
            )
            both = torch.promote_types(x.dtype, values.dtype)
            return torch.nn.functional.linear(x.to(both), dense[:, :columns].to(both)).to(x.dtype)
        few = len(x) <= 16  # for more there are more sums than registers
        x = aligned(torch.nn.functional.pad(x, (0, -columns % COLUMNS.value)))
        y = partial(count, len(x), out, x)
        tiles, bf16 = max(1, triton.next_power_of_2(len(x)) // 8), x.dtype == torch.bfloat16
        _multiply[(down, count)](
            x, bits, values, begins, y, out, x.shape[1], across, len(x), levels, tiles, bf16,
            num_warps=warps, maxnreg=REGISTERS if few else None,
        )  # fmt: skip
        return added(y, x.dtype)


@cache
def _has_prompt(device: torch.device) -> bool:
    """Return whether the GPU has the products that `_prompt` is made of, and Triton the language it is written in."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (3, 6)


@triton.jit
def _block(bits, begins, group, k, across, lane):
    """Load the mask of a row's k-th block, four words for each lane, and where its own begin; beyond the last, an empty one."""
    at = group * across + tl.minimum(k, across - 1)
    m0, m1, m2, m3 = load((bits + at.to(tl.int64) * (32 * SHARE // 8) + lane * (SHARE // 8)).to(tl.int64))
    live = tl.where(k < across, -1, 0)
    return m0 & live, m1 & live, m2 & live, m3 & live, tl.load(begins + at)


@triton.jit
def _fill(place, values, begin, m0, m1, m2, m3, lane):
    """Begin to copy the words of a block to the columns of its warp."""
    ENTRIES: tl.constexpr = 32 // values.dtype.element_ty.primitive_bitwidth  # of a word
    kept = popc(m0) + popc(m1) + popc(m2) + popc(m3)
    fill(place, (values + begin.to(tl.int64) * ENTRIES).to(tl.int64), (kept + (ENTRIES - 1)) // ENTRIES, lane)


@triton.jit
def _eight(place, at, mask, i: tl.constexpr, table):
    """Return the eight columns of the i-th byte of a lane's mask, two in an int32, and where the lane is then."""
    word = mask[i // 4]
    bits = (word << 2 if i % 4 == 0 else word >> (8 * (i % 4) - 2)) & 60
    a, b, at = four(place, at, bits, table)
    c, d, at = four(place, at, (word >> (8 * (i % 4) + 2)) & 60, table)
    return a, b, c, d, at


@triton.jit(do_not_specialize=["out", "across", "batch"])
def _multiply(
    x, bits, values, begins, y, out, columns, across, batch, LEVELS: tl.constexpr, TILES: tl.constexpr, BF16: tl.constexpr
):  # fmt: skip
    """Up to 64 inputs, one row of blocks, some of its blocks: a part of their sums, (parts, batch, out)."""
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    g, t = lane // 4, lane % 4
    group, turn = tl.program_id(0), WARPS * tl.num_programs(1)
    place, table = column(LEVELS, WARPS)
    inputs = ()
    for n in tl.static_range(TILES):  # those that are not there are the last one again, and their sums go nowhere
        inputs += (x + tl.minimum(n * 8 + g, batch - 1).to(tl.int64) * columns + t * 8,)
    total = (tl.zeros([32 * WARPS], tl.float32),) * (4 * TILES)
    k = tl.program_id(1) * WARPS + warp
    m0, m1, m2, m3, begin = _block(bits, begins, group, k, across, lane)
    for _ in range(tl.program_id(1) * WARPS, across, turn):
        mask = (m0, m1, m2, m3)
        _fill(place, values, begin, m0, m1, m2, m3, lane)
        here = tl.minimum(k, across - 1) * COLUMNS
        k += turn
        m0, m1, m2, m3, begin = _block(bits, begins, group, k, across, lane)
        wait(lane)
        at = tl.zeros([32 * WARPS], tl.int32)
        for u in tl.static_range(STEPS):
            a0, a2, c0, c2, at = _eight(place, at, mask, 2 * u, table)
            a1, a3, c1, c3, at = _eight(place, at, mask, 2 * u + 1, table)
            new = ()
            for n in tl.static_range(TILES):
                b0, b1, b2, b3 = load((inputs[n] + (here + u * 32)).to(tl.int64))
                s0, s1, s2, s3 = total[4 * n], total[4 * n + 1], total[4 * n + 2], total[4 * n + 3]
                s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3, BF16)
                s0, s1, s2, s3 = multiply(c0, c1, c2, c3, b2, b3, s0, s1, s2, s3, BF16)
                new += (s0, s1, s2, s3)
            total = new
    own = tl.arange(0, 32)
    for i in tl.static_range(4 * TILES):
        summed = tl.sum(tl.reshape(total[i], [WARPS, 32]), 0)
        b = i // 4 * 8 + own % 4 * 2 + i % 2
        row = group * ROWS + own // 4 + i % 4 // 2 * 8
        to = (tl.program_id(1) * batch + b).to(tl.int64) * out + row
        tl.store(y + to, summed.to(y.dtype.element_ty), mask=(row < out) & (b < batch))


@triton.jit
def _half_byte(place, at, mask, i: tl.constexpr, half: tl.constexpr):
    """Return four columns of the i-th byte of a lane's mask, entries of 32 bits, and how far the lane is then."""
    found = ()
    for j in tl.static_range(4):
        bit = (mask[i // 4] >> (8 * (i % 4) + 4 * half + j)) & 1
        found += (one(place + at, bit),)
        at += bit * 128
    return found[0], found[1], found[2], found[3], at


@triton.jit(do_not_specialize=["out", "across"])
def _expand(dense, bits, values, begins, out, columns, across, LEVELS: tl.constexpr, WARPS: tl.constexpr):
    """One row of blocks, some of its blocks: made dense."""
    HALVES: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 16  # stores of 16 bytes that eight columns take
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    g, t = lane // 4, lane % 4
    group, turn = tl.program_id(0), WARPS * tl.num_programs(1)
    place, table = column(LEVELS, WARPS)
    row = group * ROWS + g
    to = dense + row.to(tl.int64) * columns + t * 8
    k = tl.program_id(1) * WARPS + warp
    m0, m1, m2, m3, begin = _block(bits, begins, group, k, across, lane)
    for _ in range(tl.program_id(1) * WARPS, across, turn):
        mask = (m0, m1, m2, m3)
        _fill(place, values, begin, m0, m1, m2, m3, lane)
        here = k * COLUMNS
        k += turn
        m0, m1, m2, m3, begin = _block(bits, begins, group, k, across, lane)
        wait(lane)
        at = tl.zeros([32 * WARPS], tl.int32)
        for i in tl.static_range(2 * STEPS):
            inside = (row + i % 2 * 8 < out) & (here + i // 2 * 32 + t * 8 < columns)
            for half in tl.static_range(HALVES):
                if HALVES == 1:
                    a, b, c, d, at = _eight(place, at, mask, i, table)
                else:
                    a, b, c, d, at = _half_byte(place, at, mask, i, half)
                address = to + (i % 2 * 8) * columns + (here + i // 2 * 32 + 4 * half)
                store(address.to(tl.int64), a, b, c, d, inside.to(tl.int32))
