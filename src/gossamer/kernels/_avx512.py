"""Products of rows under a mask in AVX-512, unrolled with their sums in registers, for Numba to call.

Two ways: `masked_dot` spreads a row's values to their columns, 16 or 32 at a time, and multiplies all of them; `listed_dot`
multiplies only what is kept, for many inputs at once. The first costs by the column, the second by the value.
"""

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gossamer.kernels._simd import _F32, _I8, _I16, _I32, _I64, INT, Kind, _at, _BFloat, _call, _load

_F32x16 = ir.VectorType(_F32, 16)
_I32x16 = ir.VectorType(_I32, 16)
_SIZE = {Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2, Kind.BF16_DOT: 2}

# Rows and inputs multiplied together → how many sums each pair has: an addition takes several cycles, so that few of them, one
# after the other, would wait. More rows share a load of x, more inputs share the spreading of a row.
TILES = {(1, 1): 4, (1, 4): 2, (1, 8): 1, (4, 4): 1, (3, 8): 1}


def _expanded(builder: Any, kind: Kind, pointer: Any, word: Any) -> Any:
    """The values at ``pointer`` spread to the set bits of ``word``: 32 bfloat16 for BF16_DOT, else 16 float32."""
    lanes = 32 if kind == Kind.BF16_DOT else 16
    mask = builder.bitcast(word, ir.VectorType(ir.IntType(1), lanes))
    if kind == Kind.F32:
        vector = _F32x16
        name = "llvm.masked.expandload.v16f32"
    else:
        vector = ir.VectorType(_I16, lanes)
        name = f"llvm.masked.expandload.v{lanes}i16"
    found = _call(builder, name, vector, _at(builder, pointer, vector.element), mask, ir.Constant(vector, None))
    if kind == Kind.F16:
        return builder.fpext(builder.bitcast(found, ir.VectorType(ir.HalfType(), 16)), _F32x16)
    if kind == Kind.BF16:
        wide = ir.VectorType(_I32, 16)
        return builder.bitcast(builder.shl(builder.zext(found, wide), ir.Constant(wide, [16] * 16)), _F32x16)
    return builder.bitcast(found, ir.VectorType(_BFloat(), 32)) if kind == Kind.BF16_DOT else found


@intrinsic
def masked_dot(
    typingctx: Any, kind: Any, rows: Any, batch: Any, bits: Any, stride: Any, values: Any, offsets: Any, x: Any, x_stride: Any,
    columns: Any, y: Any, y_stride: Any,
) -> Any:  # fmt: skip
    """The product of some rows of a bitmask with some inputs, one of `TILES`: y[b, r] = Σ_j w[r, j] x[b, j].

    x is bfloat16 for BF16_DOT, else float32, and zero up to the next multiple of 32 columns; y is float32. Arguments, all
    int64: `Kind`, rows, batch, bits (of the first row), stride (bytes a row of bits), values, offsets (of the first row), x,
    x_stride (bytes), columns, y, y_stride (bytes). Where the first three are constants one case is left of them.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        asked, operands = args[:3], args[3:]
        for k, (r, b) in product(Kind, TILES):
            equal = [builder.icmp_signed("==", a, _I64(int(c))) for a, c in zip(asked, (k, r, b), strict=True)]
            with builder.if_then(builder.and_(equal[0], builder.and_(equal[1], equal[2]))):
                _masked_dot(builder, k, r, b, *operands)
        return context.get_dummy_value()

    return types.void(*[INT] * 12), codegen


def _masked_dot(
    builder: Any, kind: Kind, rows: int, batch: int, bits: Any, stride: Any, values: Any, offsets: Any, x: Any, x_stride: Any,
    columns: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    lanes = 32 if kind == Kind.BF16_DOT else 16
    size, x_size, turns = _SIZE[kind], 2 if kind == Kind.BF16_DOT else 4, TILES[rows, batch]
    word_type = ir.IntType(lanes)
    x_type = ir.VectorType(_BFloat(), 32) if kind == Kind.BF16_DOT else _F32x16
    zero = ir.Constant(_F32x16, None)
    sums = {key: cgutils.alloca_once_value(builder, zero) for key in product(range(rows), range(batch), range(turns))}
    lines = [builder.add(bits, builder.mul(stride, _I64(r))) for r in range(rows)]
    begins = [_load(builder, builder.add(offsets, _I64(8 * r)), _I64, 8) for r in range(rows)]
    at = [cgutils.alloca_once_value(builder, builder.add(values, builder.mul(b, _I64(size)))) for b in begins]  # the next value

    def beyond(address: Any, word: Any) -> Any:
        count = _call(builder, f"llvm.ctpop.i{word.type.width}", word.type, word)
        return builder.add(address, builder.mul(builder.zext(count, _I64) if word.type != _I64 else count, _I64(size)))

    def add(chunk: Any, spread: list[Any], turn: int) -> None:
        """Add the products of one chunk of columns."""
        for b in range(batch):
            start = builder.add(x, builder.mul(x_stride, _I64(b)))
            xb = _load(builder, builder.add(start, builder.mul(chunk, _I64(lanes * x_size))), x_type, x_size)
            for r in range(rows):
                total = builder.load(sums[r, b, turn % turns])
                if kind == Kind.BF16_DOT:
                    total = _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _F32x16, total, spread[r], xb)
                else:
                    total = _call(builder, "llvm.fma.v16f32", _F32x16, spread[r], xb, total)
                builder.store(total, sums[r, b, turn % turns])

    # Words of 64 bits, two together where there are sums enough; a chunk's values begin where those of the bits before it end.
    long, parts = 2 if turns > 1 else 1, 64 // lanes
    with cgutils.for_range(builder, builder.sdiv(columns, _I64(64 * long))) as loop:
        for i in range(long):
            offset = builder.add(builder.mul(loop.index, _I64(8 * long)), _I64(8 * i))
            words = [_load(builder, builder.add(line, offset), _I64, 1) for line in lines]
            here = [builder.load(a) for a in at]
            for k in range(parts):
                spread = []
                for word, address in zip(words, here, strict=True):
                    start = beyond(address, builder.and_(word, _I64((1 << (lanes * k)) - 1))) if k else address
                    spread.append(
                        _expanded(builder, kind, start, builder.trunc(builder.lshr(word, _I64(lanes * k)), word_type))
                    )
                chunk = builder.add(builder.mul(loop.index, _I64(long * parts)), _I64(parts * i + k))
                add(chunk, spread, parts * i + k)
            for a, address, word in zip(at, here, words, strict=True):
                builder.store(beyond(address, word), a)
    # What is left, a chunk at a time, whose bits are read byte by byte: there may be none after the row's last.
    done = builder.mul(builder.sdiv(columns, _I64(64 * long)), _I64(long * parts))
    chunks = builder.sdiv(builder.add(columns, _I64(lanes - 1)), _I64(lanes))
    row_bytes = builder.sdiv(builder.add(columns, _I64(7)), _I64(8))
    with cgutils.for_range(builder, builder.sub(chunks, done)) as loop:
        chunk = builder.add(done, loop.index)
        spread = []
        for line, a in zip(lines, at, strict=True):
            short = cgutils.alloca_once_value(builder, word_type(0))
            for i in range(lanes // 8):
                byte = builder.add(builder.mul(chunk, _I64(lanes // 8)), _I64(i))
                with builder.if_then(builder.icmp_signed("<", byte, row_bytes)):
                    found = builder.zext(_load(builder, builder.add(line, byte), _I8, 1), word_type)
                    builder.store(builder.or_(builder.load(short), builder.shl(found, word_type(8 * i))), short)
            address, word = builder.load(a), builder.load(short)
            spread.append(_expanded(builder, kind, address, word))
            builder.store(beyond(address, word), a)
        add(chunk, spread, 0)
    wanted = ir.FunctionType(_F32, [_F32, _F32x16])
    summed = cgutils.get_or_insert_function(builder.module, wanted, "llvm.vector.reduce.fadd.v16f32")
    for r, b in product(range(rows), range(batch)):
        total = builder.load(sums[r, b, 0])
        for turn in range(1, turns):
            total = builder.fadd(total, builder.load(sums[r, b, turn]))
        total = builder.call(summed, [_F32(0.0), total], fastmath=("reassoc",))
        builder.store(total, _at(builder, builder.add(builder.add(y, builder.mul(y_stride, _I64(b))), _I64(4 * r)), _F32))


@intrinsic
def list_columns(typingctx: Any, word: Any, first: Any, to: Any) -> Any:
    """Write the column of each set bit of a word of 32, counted from ``first``, as uint16; 64 bytes are written.

    Arguments, all int64: word, first, to (address).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, first, to = args
        vector = ir.VectorType(_I16, 32)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), builder.trunc(first, _I16), _I32(0))
        splat = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, 32), [0] * 32))
        column = builder.add(splat, ir.Constant(vector, list(range(32))))
        mask = builder.bitcast(builder.trunc(word, _I32), ir.VectorType(ir.IntType(1), 32))
        # Not a compress to memory, which some processors do one entry after the other.
        packed = _call(builder, "llvm.x86.avx512.mask.compress.v32i16", vector, column, ir.Constant(vector, None), mask)
        builder.store(packed, _at(builder, to, vector)).align = 2
        return context.get_dummy_value()

    return types.void(INT, INT, INT), codegen


@intrinsic
def listed_dot(
    typingctx: Any, kind: Any, vectors: Any, values: Any, listed: Any, count: Any, x: Any, x_stride: Any, y: Any
) -> Any:
    """Multiply the kept values of a row with their inputs, 16·``vectors`` (1, 2 or 4) at a time: y = Σ_i value_i · x[listed_i].

    Arguments, all int64: `Kind`, vectors, values (address), listed (address of the values' columns, uint16), count, x (float32,
    the inputs of one column side by side), x_stride (bytes a column), y (float32).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, vectors, *operands = args
        for k, v in product((Kind.F32, Kind.F16, Kind.BF16), (1, 2, 4)):
            same = builder.icmp_signed("==", kind, _I64(int(k)))
            if k == Kind.BF16:
                same = builder.or_(same, builder.icmp_signed("==", kind, _I64(int(Kind.BF16_DOT))))
            with builder.if_then(builder.and_(same, builder.icmp_signed("==", vectors, _I64(v)))):
                _listed_dot(builder, k, v, *operands)
        return context.get_dummy_value()

    return types.void(*[INT] * 8), codegen


def _listed_dot(
    builder: Any, kind: Kind, vectors: int, values: Any, listed: Any, count: Any, x: Any, x_stride: Any, y: Any
) -> None:
    turns = 4 // vectors
    zero = ir.Constant(_F32x16, None)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(turns)]

    def add(i: Any, turn: int) -> None:
        raw = _load(
            builder, builder.add(values, builder.mul(i, _I64(_SIZE[kind]))), _F32 if kind == Kind.F32 else _I16, _SIZE[kind]
        )
        if kind == Kind.F16:
            raw = builder.fpext(builder.bitcast(raw, ir.HalfType()), _F32)
        elif kind == Kind.BF16:
            raw = builder.bitcast(builder.shl(builder.zext(raw, _I32), _I32(16)), _F32)
        one = builder.insert_element(ir.Constant(_F32x16, ir.Undefined), raw, _I32(0))
        value = builder.shuffle_vector(one, one, ir.Constant(_I32x16, [0] * 16))
        column = _load(builder, builder.add(listed, builder.shl(i, _I64(1))), _I16, 2)
        at = builder.add(x, builder.mul(builder.zext(column, _I64), x_stride))
        for v in range(vectors):
            xv = _load(builder, builder.add(at, _I64(64 * v)), _F32x16, 4)
            builder.store(_call(builder, "llvm.fma.v16f32", _F32x16, value, xv, builder.load(sums[turn][v])), sums[turn][v])

    whole = builder.sdiv(count, _I64(turns))
    with cgutils.for_range(builder, whole) as loop:
        for turn in range(turns):
            add(builder.add(builder.mul(loop.index, _I64(turns)), _I64(turn)), turn)
    done = builder.mul(whole, _I64(turns))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        add(builder.add(done, loop.index), 0)
    for v in range(vectors):
        total = builder.load(sums[0][v])
        for turn in range(1, turns):
            total = builder.fadd(total, builder.load(sums[turn][v]))
        builder.store(total, _at(builder, builder.add(y, _I64(64 * v)), _F32x16)).align = 4


@intrinsic
def masked_expand(typingctx: Any, size: Any, word: Any, values: Any, to: Any) -> Any:
    """Spread 32 columns of a bitmask to a dense row; entries are ``size`` (2 or 4) bytes.

    Arguments, all int64: size, word (its bits), values (address), to (address).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, word, values, to = args
        for bytes_ in (2, 4):
            lanes = 64 // bytes_
            vector = ir.VectorType(ir.IntType(8 * bytes_), lanes)
            name = f"llvm.masked.expandload.v{lanes}i{8 * bytes_}"
            with builder.if_then(builder.icmp_signed("==", size, _I64(bytes_))):
                at = values
                for half in range(32 // lanes):
                    short = builder.trunc(builder.lshr(word, _I64(half * lanes)), ir.IntType(lanes))
                    mask = builder.bitcast(short, ir.VectorType(ir.IntType(1), lanes))
                    found = _call(builder, name, vector, _at(builder, at, vector.element), mask, ir.Constant(vector, None))
                    builder.store(found, _at(builder, builder.add(to, _I64(64 * half)), vector)).align = bytes_
                    count = builder.zext(_call(builder, f"llvm.ctpop.i{lanes}", short.type, short), _I64)
                    at = builder.add(at, builder.mul(count, _I64(bytes_)))
        return context.get_dummy_value()

    return types.void(INT, INT, INT, INT), codegen
