"""Products of rows under a mask in AVX-512, unrolled with their sums in registers, for Numba to call.

They cost by the column: a row's values are spread to their columns, 16 or 32 at a time. `_avx512_listed` costs by the value.
"""

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gossamer.kernels._simd import _F32, _I8, _I16, _I32, _I64, _SIZE, INT, Kind, _at, _BFloat, _call, _load

_F32x16 = ir.VectorType(_F32, 16)

# Rows and inputs multiplied together. More rows share a load of x, more inputs share the spreading of a row; their sums, the
# spread values and an input have to fit into 32 registers.
TILES = ((1, 1), (4, 1), (1, 4), (3, 4), (4, 4), (3, 8))


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
    typingctx: Any, kind: Any, rows: Any, batch: Any, apart: Any, bits: Any, stride: Any, values: Any, offsets: Any, x: Any,
    x_stride: Any, columns: Any, y: Any, y_stride: Any,
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

    return types.void(*[INT] * 13), codegen


def _masked_dot(
    builder: Any, kind: Kind, rows: int, batch: int, apart: Any, bits: Any, stride: Any, values: Any, offsets: Any, x: Any,
    x_stride: Any, columns: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    lanes = 32 if kind == Kind.BF16_DOT else 16
    size, x_size = _SIZE[kind], 2 if kind == Kind.BF16_DOT else 4
    word_type = ir.IntType(lanes)
    x_type = ir.VectorType(_BFloat(), 32) if kind == Kind.BF16_DOT else _F32x16
    zero = ir.Constant(_F32x16, None)
    sums = {key: cgutils.alloca_once_value(builder, zero) for key in product(range(rows), range(batch))}
    each = [builder.mul(apart, _I64(r)) for r in range(rows)]
    lines = [builder.add(bits, builder.mul(stride, r)) for r in each]
    begins = [_load(builder, builder.add(offsets, builder.mul(r, _I64(8))), _I64, 8) for r in each]
    at = [cgutils.alloca_once_value(builder, builder.add(values, builder.mul(b, _I64(size)))) for b in begins]  # the next value

    def add(chunk: Any, words: list[Any]) -> None:
        """Add the products of one chunk of columns, whose bits are ``words``."""
        spread = []
        for a, word in zip(at, words, strict=True):
            address = builder.load(a)
            spread.append(_expanded(builder, kind, address, word))
            count = builder.zext(_call(builder, f"llvm.ctpop.i{lanes}", word_type, word), _I64)
            builder.store(builder.add(address, builder.mul(count, _I64(size))), a)
        for b in range(batch):
            start = builder.add(x, builder.mul(x_stride, _I64(b)))
            xb = _load(builder, builder.add(start, builder.mul(chunk, _I64(lanes * x_size))), x_type, x_size)
            for r in range(rows):
                total = builder.load(sums[r, b])
                if kind == Kind.BF16_DOT:
                    total = _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _F32x16, total, spread[r], xb)
                else:
                    total = _call(builder, "llvm.fma.v16f32", _F32x16, spread[r], xb, total)
                builder.store(total, sums[r, b])

    # One chunk at a time: with more of them in flight the sums would not stay in registers.
    done = builder.sdiv(columns, _I64(lanes))
    with cgutils.for_range(builder, done) as loop:
        offset = builder.mul(loop.index, _I64(lanes // 8))
        add(loop.index, [_load(builder, builder.add(line, offset), word_type, 1) for line in lines])
    # The last columns, whose bits are read byte by byte: there may be none after the row's last.
    with builder.if_then(builder.icmp_signed("<", builder.mul(done, _I64(lanes)), columns)):
        row_bytes = builder.sdiv(builder.add(columns, _I64(7)), _I64(8))
        words = []
        for line in lines:
            short = cgutils.alloca_once_value(builder, word_type(0))
            for i in range(lanes // 8):
                byte = builder.add(builder.mul(done, _I64(lanes // 8)), _I64(i))
                with builder.if_then(builder.icmp_signed("<", byte, row_bytes)):
                    found = builder.zext(_load(builder, builder.add(line, byte), _I8, 1), word_type)
                    builder.store(builder.or_(builder.load(short), builder.shl(found, word_type(8 * i))), short)
            words.append(builder.load(short))
        add(done, words)
    wanted = ir.FunctionType(_F32, [_F32, _F32x16])
    summed = cgutils.get_or_insert_function(builder.module, wanted, "llvm.vector.reduce.fadd.v16f32")
    for r, b in product(range(rows), range(batch)):
        total = builder.call(summed, [_F32(0.0), builder.load(sums[r, b])], fastmath=("reassoc",))
        builder.store(
            total,
            _at(builder, builder.add(builder.add(y, builder.mul(y_stride, _I64(b))), builder.mul(each[r], _I64(4))), _F32),
        )


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
