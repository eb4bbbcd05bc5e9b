"""Products of what is kept alone, by a list of it, in AVX-512, for Numba to call: they cost by the value, not by the column."""

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gossamer.kernels._simd import _F32, _I16, _I32, _I64, _SIZE, INT, Kind, _at, _BFloat, _call, _load

VECTORS = (1, 2, 4)  # of inputs, 8 each, that one call of `listed_dot` may multiply


@intrinsic
def list_columns(typingctx: Any, word: Any, first: Any, step: Any, to: Any) -> Any:
    """Write ``step`` times the column of each set bit of a word of 32, counted from ``first``, as uint16; 64 bytes are written.

    Arguments, all int64: word, first, step, to (address).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, first, step, to = args
        vector = ir.VectorType(_I16, 32)

        steps = builder.mul(_splat(builder, builder.trunc(step, _I16), 32), ir.Constant(vector, list(range(32))))
        column = builder.add(_splat(builder, builder.trunc(builder.mul(first, step), _I16), 32), steps)
        mask = builder.bitcast(builder.trunc(word, _I32), ir.VectorType(ir.IntType(1), 32))
        # Not a compress to memory, which some processors do one entry after the other.
        packed = _call(builder, "llvm.x86.avx512.mask.compress.v32i16", vector, column, ir.Constant(vector, None), mask)
        half = ir.VectorType(_I16, 16)
        low, high = (
            builder.shuffle_vector(packed, packed, ir.Constant(ir.VectorType(_I32, 16), list(range(i, i + 16))))
            for i in (0, 16)
        )
        builder.store(low, _at(builder, to, half)).align = 2
        count = _call(builder, "llvm.ctpop.i64", _I64, word)
        with builder.if_then(builder.icmp_signed(">", count, _I64(16))):  # rare where little is kept
            builder.store(high, _at(builder, builder.add(to, _I64(32)), half)).align = 2
        return context.get_dummy_value()

    return types.void(INT, INT, INT, INT), codegen


@intrinsic
def listed_dot(
    typingctx: Any, kind: Any, vectors: Any, values: Any, listed: Any, count: Any, x: Any, nothing: Any, y: Any
) -> Any:
    """Add the products of a row's kept values with their inputs, 8·``vectors`` at a time: y += Σ_i value_i · x[listed_i].

    Arguments, all int64: `Kind`, vectors (one of `VECTORS`), values (address), listed (address, uint16: where a value's inputs
    begin in x, in 8 bytes), count, x (the inputs of one column side by side; bfloat16 for BF16_DOT, else float32), nothing
    (where zeros begin in x, in bytes), y (float32; for BF16_DOT in the order of `_pair`).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, vectors, *operands = args
        for k, v in product(Kind, VECTORS):
            same = builder.icmp_signed("==", kind, _I64(int(k)))
            with builder.if_then(builder.and_(same, builder.icmp_signed("==", vectors, _I64(v)))):
                _listed_dot(builder, k, v, *operands)
        return context.get_dummy_value()

    return types.void(*[INT] * 8), codegen


def _one(builder: Any, kind: Kind, values: Any, i: Any, begin: Any, sums: list[Any]) -> None:
    """Multiply one value with its inputs, which begin at an address."""
    raw = _load(
        builder, builder.add(values, builder.mul(i, _I64(_SIZE[kind]))), _F32 if kind == Kind.F32 else _I16, _SIZE[kind]
    )
    if kind == Kind.F16:
        raw = builder.fpext(builder.bitcast(raw, ir.HalfType()), _F32)
    elif kind == Kind.BF16:
        raw = builder.bitcast(builder.shl(builder.zext(raw, _I32), _I32(16)), _F32)
    value = _splat(builder, raw, 8)
    for v, place in enumerate(sums):
        xv = _load(builder, builder.add(begin, _I64(32 * v)), value.type, 4)
        builder.store(_call(builder, "llvm.fma.v8f32", value.type, value, xv, builder.load(place)), place)


def _pair(builder: Any, vectors: int, pair: Any, begins: list[Any], sums: list[Any]) -> None:
    """Multiply two values, bfloat16 in one int32, with their inputs, and sum them in one instruction.

    The inputs are interleaved in each 128 bits: the first sums are of inputs 0 to 3, 8 to 11 ..., the second of the others.
    """
    vector = ir.VectorType(_I16, 8 * vectors)
    first, second = (_load(builder, begin, vector, 2) for begin in begins)
    values = builder.bitcast(_splat(builder, pair, 4 * vectors), ir.VectorType(_BFloat(), 8 * vectors))
    for half, place in enumerate(sums):
        lanes = [8 * v + 4 * half + i for v in range(vectors) for i in range(4)]
        order = [lane + other for lane in lanes for other in (0, 8 * vectors)]
        both = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(order)), order))
        name = f"llvm.x86.avx512bf16.dpbf16ps.{128 * vectors}"
        total = builder.load(place)
        builder.store(_call(builder, name, total.type, total, builder.bitcast(both, values.type), values), place)


def _splat(builder: Any, number: Any, lanes: int) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _listed_dot(
    builder: Any, kind: Kind, vectors: int, values: Any, listed: Any, count: Any, x: Any, nothing: Any, y: Any
) -> None:
    paired = kind == Kind.BF16_DOT
    step, turns = (
        (2, 4) if paired else (1, 4 // vectors)
    )  # an addition takes several cycles: a single sum would wait for itself
    vector = ir.VectorType(_F32, 4 * vectors if paired else 8)
    places = [builder.add(y, _I64(32 * vectors // (2 if paired else vectors) * i)) for i in range(2 if paired else vectors)]
    sums = [
        [cgutils.alloca_once_value(builder, ir.Constant(vector, None) if t else _load(builder, p, vector, 4)) for p in places]
        for t in range(turns)
    ]

    def begin(i: Any) -> Any:
        found = _load(builder, builder.add(listed, builder.shl(i, _I64(1))), _I16, 2)
        return builder.add(x, builder.shl(builder.zext(found, _I64), _I64(3)))

    def add(i: Any, turn: int) -> None:
        if paired:
            pair = _load(builder, builder.add(values, builder.shl(i, _I64(1))), _I32, 2)
            _pair(builder, vectors, pair, [begin(i), begin(builder.add(i, _I64(1)))], sums[turn])
        else:
            _one(builder, kind, values, i, begin(i), sums[turn])

    whole = builder.sdiv(count, _I64(step * turns))
    with cgutils.for_range(builder, whole) as loop:
        for turn in range(turns):
            add(builder.add(builder.mul(loop.index, _I64(step * turns)), _I64(step * turn)), turn)
    done = builder.mul(whole, _I64(step * turns))
    with cgutils.for_range(builder, builder.sdiv(builder.sub(count, done), _I64(step))) as loop:
        add(builder.add(done, builder.mul(loop.index, _I64(step))), 0)
    if paired:
        with builder.if_then(builder.trunc(count, ir.IntType(1))):
            last = builder.sub(count, _I64(1))
            value = builder.zext(_load(builder, builder.add(values, builder.shl(last, _I64(1))), _I16, 2), _I32)
            _pair(builder, vectors, value, [begin(last), builder.add(x, nothing)], sums[0])
    for i, place in enumerate(places):
        total = builder.load(sums[0][i])
        for turn in range(1, turns):
            total = builder.fadd(total, builder.load(sums[turn][i]))
        builder.store(total, _at(builder, place, vector)).align = 4
