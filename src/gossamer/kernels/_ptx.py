"""The few steps that Triton has no word for, as inline PTX: each works on single elements, whatever the tensors' layout.

A *place* is an address in shared memory. The tensors in Triton's own shared memory are laid out by the compiler; entries that
go where their column says need memory of their own, and `tl.debug_barrier` between those who write it and those who read it.
"""

import triton
import triton.language as tl

ROOM_BYTES = 17408

_ROOM = tl.constexpr(f"{{ .shared .align 1024 .b8 room[{ROOM_BYTES}]; mov.u32 $0, room; }}")
_PUT_PAIR = tl.constexpr("""{
.reg .pred p;
.reg .b16 low, high;
.reg .b32 t;
mov.b32 {low, high}, $3;
and.b32 t, $3, 0xffff;
setp.ne.u32 p, t, 0;
@p st.shared.b16 [$1], low;
and.b32 t, $3, 0xffff0000;
setp.ne.u32 p, t, 0;
@p st.shared.b16 [$2], high;
mov.u32 $0, 0;
}""")
_PUT = tl.constexpr("""{
.reg .pred p;
setp.ne.u32 p, $2, 0;
@p st.shared.b32 [$1], $2;
mov.u32 $0, 0;
}""")
_TAKE = tl.constexpr("""{
.reg .b32 zero;
ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];
mov.u32 zero, 0;
st.shared.v4.b32 [$4], {zero, zero, zero, zero};
}""")


@triton.jit
def room():
    """Return the place of `ROOM_BYTES` bytes of shared memory; what is in them is not said."""
    return tl.inline_asm_elementwise(_ROOM, "=r,r", [tl.program_id(0)], tl.int32, is_pure=False, pack=1)


@triton.jit
def put_pair(low, high, pair):
    """Write the two 16-bit halves of each int32 to their places, those of all zero bits excepted."""
    tl.inline_asm_elementwise(_PUT_PAIR, "=r,r,r,r", [low, high, pair], tl.int32, is_pure=False, pack=1)


@triton.jit
def put(place, word):
    """Write each int32 to its place, those of all zero bits excepted."""
    tl.inline_asm_elementwise(_PUT, "=r,r,r", [place, word], tl.int32, is_pure=False, pack=1)


@triton.jit
def take(place):
    """Return the four int32 at each place, and leave zeros there."""
    return tl.inline_asm_elementwise(
        _TAKE, "=&r,=&r,=&r,=&r,r", [place], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
    )


# The values of up to 8 columns begin at any even address: three aligned loads of 8 bytes hold them, of which only those are
# made that hold one at least, so that nothing beyond the values' last 8 bytes is touched.
_FETCH = tl.constexpr("""{
.reg .pred p;
.reg .b64 a;
.reg .b32 n, t;
and.b64 a, $6, -8;
popc.b32 n, $7;
cvt.u32.u64 t, $6;
and.b32 t, t, 6;
mad.lo.u32 n, n, 2, t;
setp.ne.u32 p, $7, 0;
@p ld.global.v2.b32 {$0, $1}, [a];
setp.gt.u32 p, n, 8;
@p ld.global.v2.b32 {$2, $3}, [a + 8];
setp.gt.u32 p, n, 16;
@p ld.global.v2.b32 {$4, $5}, [a + 16];
}""")


# First the values are shifted to the front: r0 holds the first two. Then two columns at a time: their two bits choose, out of
# the four in k, how the bytes of r0 and of zero make up the pair, and what was used is shifted out. s counts each two bits.
def _amount(source: str, pair: int) -> str:
    """16 times the two bits of a pair."""
    return f"{'shl' if pair < 2 else 'shr'}.b32 t, {source}, {abs(4 - 2 * pair)};\nand.b32 t, t, 48;\n"


def _pair(i: int) -> str:
    used = _amount("s", i) + "".join(f"shf.r.clamp.b32 r{j}, r{j}, r{j + 1}, t;\n" for j in range(3 - i))
    return f"{_amount('m', i)}shr.u64 a, k, t;\ncvt.u32.u64 t, a;\nprmt.b32 ${i}, r0, 0, t;\n{used if i < 3 else ''}"


_SPREAD = tl.constexpr(
    """{
.reg .pred p;
.reg .b64 a, k;
.reg .b32 r0, r1, r2, r3, t, s, m;
mov.b32 m, $11;
and.b32 t, $10, 4;
setp.ne.u32 p, t, 0;
selp.b32 r0, $5, $4, p;
selp.b32 r1, $6, $5, p;
selp.b32 r2, $7, $6, p;
selp.b32 r3, $8, $7, p;
selp.b32 s, $9, $8, p;
and.b32 t, $10, 2;
shl.b32 t, t, 3;
shf.r.wrap.b32 r0, r0, r1, t;
shf.r.wrap.b32 r1, r1, r2, t;
shf.r.wrap.b32 r2, r2, r3, t;
shf.r.wrap.b32 r3, r3, s, t;
mov.b64 k, 0x3210104444104444;
shr.u32 s, m, 1;
and.b32 s, s, 0x55;
sub.u32 s, m, s;
"""
    + "".join(map(_pair, range(4)))
    + "}"
)


@triton.jit
def fetch(place, byte):
    """Load the 16-bit values of the columns whose bits are set in each byte, from the address place on: six int32."""
    return tl.inline_asm_elementwise(
        _FETCH,
        "=&r,=&r,=&r,=&r,=&r,=&r,l,r",
        [place, byte],
        (tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def spread(words, place, byte):
    """Return eight columns, two in an int32, zero where their bit in byte is not set, from what `fetch` has loaded."""
    a, b, c, d, e, f = words
    return tl.inline_asm_elementwise(
        _SPREAD,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
        [a, b, c, d, e, f, place.to(tl.int32), byte],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
