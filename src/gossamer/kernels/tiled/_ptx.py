"""What a lane of a warp does with its part of a block, as inline PTX.

Everything here works on one element a lane: a tensor of 32 elements for each warp, which Triton gives to the lanes in order. A
lane's words wait in its own *column* of shared memory, one word a level, so that no two lanes meet at a bank, whatever word
each of them is at. Where a lane is, is counted in 16ths of an entry: bits 5 and up are the level, and the lower ones, by how
many bits the next entry is away from the word's first.
"""

import triton
import triton.language as tl


# Level by level all lanes have a word, until the first lane has no more; from there on, lanes that have one stand side by side.
# Several such levels at a time take longer code and less time: what they need of each other is little.
@triton.constexpr_function
def _fill(together):
    names = ", ".join(f"{name}{j}" for j in range(together) for name in ("active", "below"))
    votes = "".join(
        f"""add.u32 below{j}, level, {j};
setp.lt.u32 q{j}, below{j}, $3;
vote.sync.ballot.b32 active{j}, q{j}, -1;
and.b32 below{j}, active{j}, less;
popc.b32 below{j}, below{j};
popc.b32 active{j}, active{j};
"""
        for j in range(together)
    )
    copies = "".join(
        f"""mul.wide.u32 step, below{j}, 4;
add.u64 step, from, step;
@q{j} cp.async.ca.shared.global [to + {128 * j}], [step], 4;
mul.wide.u32 step, active{j}, 4;
add.u64 from, from, step;
"""
        for j in range(together)
    )
    return f"""{{
.reg .pred p, {", ".join(f"q{j}" for j in range(together))};
.reg .b32 all, most, level, to, less, {names};
.reg .b64 from, step;
redux.sync.min.u32 all, $3, -1;
redux.sync.max.u32 most, $3, -1;
mov.u32 less, %lanemask_lt;
mov.u32 level, 4;
mov.u32 to, $1;
mul.wide.u32 step, $4, 4;
add.u64 from, $2, step;
FOUR:
setp.gt.u32 p, level, all;
@p bra REST;
cp.async.ca.shared.global [to], [from], 4;
cp.async.ca.shared.global [to + 128], [from + 128], 4;
cp.async.ca.shared.global [to + 256], [from + 256], 4;
cp.async.ca.shared.global [to + 384], [from + 384], 4;
add.u32 to, to, 512;
add.u64 from, from, 512;
add.u32 level, level, 4;
bra FOUR;
REST:
sub.u32 level, level, 4;
sub.u64 from, from, step;
SOME:
setp.ge.u32 p, level, most;
@p bra DONE;
{votes}{copies}add.u32 to, to, {128 * together};
add.u32 level, level, {together};
bra SOME;
DONE:
mov.u32 $0, 0;
}}"""


_PUT = tl.constexpr("st.shared.b32 [$1], $2; bar.warp.sync -1; mov.u32 $0, 0;")
_LOAD = tl.constexpr("ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];")
# The lane's next four entries are shifted to the front of two words; the table says, for each four bits of a mask, which of
# their bytes make up four columns: bytes 6 and 7, which are zeros unless all four are kept, where one is not.
_FOUR = tl.constexpr("""{
.reg .pred p;
.reg .b32 a, b, c, t, chosen;
and.b32 t, $4, -32;
mad.lo.u32 t, t, 4, $3;
ld.shared.b32 a, [t];
ld.shared.b32 b, [t + 128];
ld.shared.b32 c, [t + 256];
add.u32 t, $6, $5;
ld.shared.b32 chosen, [t];
shf.r.wrap.b32 a, a, b, $4;
shf.r.wrap.b32 b, b, c, $4;
setp.ne.u32 p, $5, 60;
@p and.b32 b, b, 0xffff;
prmt.b32 $0, a, b, chosen;
shr.u32 t, chosen, 16;
prmt.b32 $1, a, b, t;
popc.b32 t, $5;
mad.lo.u32 $2, t, 16, $4;
}""")
_WAIT = tl.constexpr("cp.async.wait_all; mov.u32 $0, 0;")
_ONE = tl.constexpr("""{
.reg .pred p;
setp.ne.u32 p, $2, 0;
mov.u32 $0, 0;
@p ld.shared.b32 $0, [$1];
}""")
_STORE = tl.constexpr("""{
.reg .pred p;
setp.ne.u32 p, $6, 0;
@p st.global.v4.b32 [$1], {$2, $3, $4, $5};
mov.u32 $0, 0;
}""")


@triton.constexpr_function
def _room(size):
    return f"{{ .shared .align 128 .b8 column[{size}]; mov.u32 $0, column; }}"


@triton.constexpr_function
def _product(bf16):
    kind = "bf16" if bf16 else "f16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@triton.jit
def column(LEVELS: tl.constexpr, WARPS: tl.constexpr):
    """Return the place of each lane's column, and that of its warp's table, which is filled here."""
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    SIZE: tl.constexpr = (LEVELS + 3) * 128  # two levels more are read than are used; and the table
    begin = tl.inline_asm_elementwise(_room(SIZE * WARPS), "=r,r", [thread], tl.int32, is_pure=False, pack=1) + warp * SIZE
    chosen = tl.zeros([32 * WARPS], tl.int32)
    before = tl.zeros([32 * WARPS], tl.int32)
    for j in tl.static_range(4):
        bit = (lane >> j) & 1
        entry = tl.where(bit != 0, before, 3)
        chosen |= (2 * entry | (2 * entry + 1) << 4) << (8 * j)
        before += bit
    table = begin + SIZE - 128
    tl.inline_asm_elementwise(_PUT, "=r,r,r", [table + lane * 4, chosen], tl.int32, is_pure=False, pack=1)
    return begin + lane * 4, table


@triton.jit
def fill(place, source, words, lane, TOGETHER: tl.constexpr = 1):
    """Begin to copy a block's words, which lie from an address on, to the columns of a warp; words says how many a lane has."""
    tl.inline_asm_elementwise(_fill(TOGETHER), "=&r,r,l,r,r", [place, source, words, lane], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(lane):
    """Wait for what a lane has begun to copy."""
    tl.inline_asm_elementwise(_WAIT, "=r,r", [lane], tl.int32, is_pure=False, pack=1)


@triton.jit
def load(address):
    """Return the 16 bytes at each address as four int32."""
    return tl.inline_asm_elementwise(
        _LOAD, "=r,=r,=r,=r,l", [address], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def four(place, at, bits, table):
    """Return the next four columns of a lane, two in an int32, and where it is then; bits say which are kept, times four."""
    return tl.inline_asm_elementwise(
        _FOUR,
        "=&r,=&r,=&r,r,r,r,r",
        [place, at, bits, table],
        (tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def one(place, wanted):
    """Return the word at each place, or zero."""
    return tl.inline_asm_elementwise(_ONE, "=&r,r,r", [place, wanted], tl.int32, is_pure=False, pack=1)


@triton.jit
def multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, BF16: tl.constexpr):
    """Return C + A B, A 16×16 and B 16×8, each lane's parts of them."""
    return tl.inline_asm_elementwise(
        _product(BF16),
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def store(address, a, b, c, d, wanted):
    """Write 16 bytes to each address, where wanted."""
    tl.inline_asm_elementwise(_STORE, "=r,l,r,r,r,r,r", [address, a, b, c, d, wanted], tl.int32, is_pure=False, pack=1)
