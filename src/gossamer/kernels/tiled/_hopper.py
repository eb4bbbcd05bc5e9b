"""x Wᵀ for a tiled bitmask and many inputs on a Hopper GPU, in one kernel: nothing dense is ever written.

A program makes yᵀ for 128 rows of the weight and 256 inputs. Each of its warps decodes a row of blocks, and what a lane decodes
is its part of the tensor cores' left operand, which they take from registers; inputs come through shared memory. The tensor
cores multiply while the next columns are decoded and those after them are copied.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from gossamer.kernels.tiled import _ptx, layout

COLUMNS, SHARE = gl.constexpr(layout.COLUMNS), gl.constexpr(layout.SHARE)
DEEP = gl.constexpr(64)  # columns of a step
STEPS = gl.constexpr(layout.COLUMNS // 64)
TOGETHER = gl.constexpr(4)  # uneven levels that are copied at a time

fill, four, load, wait = (gluon.jit(f.fn) for f in (_ptx.fill, _ptx.four, _ptx.load, _ptx.wait))
_ROOM = gl.constexpr("mov.u32 $0, global_smem;")
_PUT = gl.constexpr("st.shared.b32 [$1], $2; bar.warp.sync -1; mov.u32 $0, 0;")
_POPC = gl.constexpr("popc.b32 $0, $1;")
_SAME = gl.constexpr("""{
.reg .pred p;
.reg .b32 t;
ld.shared.b32 t, [$1];
setp.ne.u32 p, t, $2;
@p trap;
mov.u32 $0, 0;
}""")


@gluon.jit
def _ones(m):
    return gl.inline_asm_elementwise(_POPC, "=r,r", [m], gl.int32, is_pure=True, pack=1)


@gluon.jit
def _columns(room, STAGES: gl.constexpr, LEVELS: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """Return the places of each lane's two columns, and that of its warp's table, which is filled here."""
    STAGE: gl.constexpr = room.shape[1] * room.shape[2] * 2
    thread = gl.arange(0, 32 * WARPS, layout)
    warp, lane = thread // 32, thread % 32
    place = gl.inline_asm_elementwise(_ROOM, "=r,r", [thread], gl.int32, is_pure=False, pack=1) + STAGES * STAGE
    # The compiler places what it allocates, the largest first; that the words begin where they are looked for is made sure of.
    probe = room.index(STAGES)._reinterpret(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    probe.store(gl.arange(0, 32, layout) ^ 0x5A17ED)
    gl.thread_barrier()
    gl.inline_asm_elementwise(_SAME, "=r,r,r", [place + lane * 4, lane ^ 0x5A17ED], gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()
    HIGH: gl.constexpr = (LEVELS + 2) * 128  # two levels more are read than are used
    begin = place + warp * (2 * HIGH + 128)
    chosen = lane * 0
    before = lane * 0
    for j in gl.static_range(4):
        bit = (lane >> j) & 1
        entry = gl.where(bit != 0, before, 3)
        chosen |= (2 * entry | (2 * entry + 1) << 4) << (8 * j)
        before += bit
    table = begin + 2 * HIGH
    gl.inline_asm_elementwise(_PUT, "=r,r,r", [table + lane * 4, chosen], gl.int32, is_pure=False, pack=1)
    return begin + lane * 4, begin + HIGH + lane * 4, table


@gluon.jit
def _block(bits, begins, group, k, across, live, lane):
    """Load the mask of a row's k-th block, four words for each lane, and where its own begin; where not live, an empty one."""
    at = group * across + gl.minimum(k, across - 1)
    m0, m1, m2, m3 = load((bits + at.to(gl.int64) * (32 * SHARE // 8) + lane * (SHARE // 8)).to(gl.int64))
    all = gl.where(live, -1, 0)
    return m0 & all, m1 & all, m2 & all, m3 & all, gl.load(begins + at)


@gluon.jit
def _fill(place, values, begin, m0, m1, m2, m3, lane):
    """Begin to copy the words of a block to the columns of its warp."""
    kept = _ones(m0) + _ones(m1) + _ones(m2) + _ones(m3)
    fill(place, (values + begin.to(gl.int64) * 2).to(gl.int64), (kept + 1) >> 1, lane, TOGETHER)


@gluon.jit
def _eight(place, at, mask, i: gl.constexpr, table):
    """Return the eight columns of the i-th byte of a lane's mask, two in an int32, and where the lane is then."""
    word = mask[i // 4]
    bits = (word << 2 if i % 4 == 0 else word >> (8 * (i % 4) - 2)) & 60
    a, b, at = four(place, at, bits, table)
    c, d, at = four(place, at, (word >> (8 * (i % 4) + 2)) & 60, table)
    return a, b, c, d, at


@gluon.jit
def _operand(place, at, mask, u: gl.constexpr, table, WARPS: gl.constexpr, left: gl.constexpr, dtype: gl.constexpr):
    """Return the u-th 64 columns as the left operand, each entry in the register where it was decoded."""
    words = ()
    for i in gl.static_range(2):
        a0, a2, c0, c2, at = _eight(place, at, mask, 4 * u + 2 * i, table)
        a1, a3, c1, c3, at = _eight(place, at, mask, 4 * u + 2 * i + 1, table)
        words += (a0, a1, a2, a3, c0, c1, c2, c3)
    for j in gl.static_range(4):  # of 16: 32nd columns, then 16th, then 8th, then rows
        joined = ()
        for i in gl.static_range(8 >> j):
            joined += (gl.join(words[i], words[i + (8 >> j)]),)
        words = joined
    pairs = gl.join(words[0].to(gl.int16), (words[0] >> 16).to(gl.int16)).to(dtype, bitcast=True)
    apart = gl.reshape(pairs, [WARPS, 8, 4, 2, 2, 2, 2, 2])
    whole = gl.reshape(gl.permute(apart, [0, 6, 1, 3, 4, 5, 2, 7]), [16 * WARPS, DEEP])
    return gl.convert_layout(whole, left, assert_trivial=True), at


@gluon.jit
def _inputs(x, room, ready, step, steps, row, column, STAGES: gl.constexpr):
    """Begin to copy the inputs of a step."""
    wanted = step < steps
    bar = ready.index(step % STAGES)
    mbarrier.expect(bar, x.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(x, [row, column + step * DEEP], bar, room.index(step % STAGES), pred=wanted)


@gluon.jit
def _store(y, sums, out, batch, token, WARPS: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Write yᵀ of (rows, inputs)."""
    row = gl.program_id(1) * (16 * WARPS) + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, layout))
    b = token + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    to = (gl.program_id(2) * batch + b).to(gl.int64) * out
    gl.store(y + to[None, :] + row[:, None], sums, mask=(row < out)[:, None] & (b < batch)[None, :])


@gluon.jit(do_not_specialize=["across", "down", "batch"])
def multiply(
    x, bits, values, begins, y, out, across, down, batch,
    LEVELS: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr, WARPS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Up to 256 inputs, 128 rows, some of their blocks: a part of their sums, (parts, batch, out)."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    dtype: gl.constexpr = values.dtype.element_ty
    # Stages of inputs, and what the columns of words take, as many stages more.
    room = gl.allocate_shared_memory(dtype, [STAGES + WORDS, TOKENS, DEEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    first = across * gl.program_id(2) // gl.num_programs(2)
    last = across * (gl.program_id(2) + 1) // gl.num_programs(2)
    steps = (last - first) * STEPS
    token = gl.program_id(0) * TOKENS
    thread = gl.arange(0, 32 * WARPS, lanes)
    lane = thread % 32
    group = gl.program_id(1) * WARPS + thread // 32
    inside = group < down
    group = gl.minimum(group, down - 1)
    m0, m1, m2, m3, begin = _block(bits, begins, group, first, across, inside, lane)
    n0, n1, n2, n3, after = _block(bits, begins, group, first + 1, across, inside & (first + 1 < last), lane)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    for s in gl.static_range(STAGES - 1):
        _inputs(x, room, ready, s, steps, token, first * COLUMNS, STAGES)
    here, there, table = _columns(room, STAGES, LEVELS, WARPS, lanes)
    _fill(here, values, begin, m0, m1, m2, m3, lane)
    wait(lane)
    a, at = _operand(here, lane * 0, (m0, m1, m2, m3), 0, table, WARPS, left, dtype)
    total = gl.full([16 * WARPS, TOKENS], 0.0, gl.float32, sums)
    step = 0
    for k in range(first, last):
        for u in gl.static_range(STEPS):
            mbarrier.wait(ready.index(step % STAGES), (step // STAGES) & 1)
            total = hopper.warpgroup_mma(a, room.index(step % STAGES).permute((1, 0)), total, is_async=True)
            if u > 0:
                total = hopper.warpgroup_mma_wait(1, deps=[total])
            _inputs(x, room, ready, step + (STAGES - 1), steps, token, first * COLUMNS, STAGES)
            step += 1
            if u == 0:
                _fill(there, values, after, n0, n1, n2, n3, lane)
                l0, l1, l2, l3, later = _block(bits, begins, group, k + 2, across, inside & (k + 2 < last), lane)
            if u < STEPS - 1:
                a, at = _operand(here, at, (m0, m1, m2, m3), u + 1, table, WARPS, left, dtype)
        wait(lane)
        a, at = _operand(there, lane * 0, (n0, n1, n2, n3), 0, table, WARPS, left, dtype)
        total = hopper.warpgroup_mma_wait(0, deps=[total])
        here, there = there, here
        m0, m1, m2, m3 = n0, n1, n2, n3
        n0, n1, n2, n3, after = l0, l1, l2, l3, later
    gl.thread_barrier()
    room._keep_alive()

    # For float32 eight lanes write 32 bytes in a row; for 16 bits, what a lane holds is made longer by way of shared memory.
    if y.dtype.element_ty == gl.float32:
        _store(y, total, out, batch, token, WARPS, TOKENS, sums)
    else:
        own: gl.constexpr = gl.BlockedLayout([8, 1], [2 * WARPS, 16 // WARPS], [1, WARPS], [0, 1])
        turned: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2, transposed=True)
        tile = gl.allocate_shared_memory(y.dtype.element_ty, [16 * WARPS, TOKENS], turned)
        tile.store(total.to(y.dtype.element_ty))
        _store(y, tile.load(own), out, batch, token, WARPS, TOKENS, own)
