"""What Numba does not have: raw pointers, an atomic counter, 16-bit floats.

With `_avx512`, `_avx512_listed` and `_avx2` the only file that writes LLVM. Pointers are int64 addresses; `Kind` says what the
values are and how they are multiplied.
"""

import platform
from enum import IntEnum
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gossamer.kernels._choice import cpu_features


class Kind(IntEnum):
    """A dtype of values, and for bfloat16 whether products of pairs are summed in one instruction (AVX512-BF16)."""

    F32 = 0
    F16 = 1
    BF16 = 2
    BF16_DOT = 3


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]  # llvmlite has no bfloat
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_F32x16 = ir.VectorType(_F32, 16)
_SIZE = {Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2, Kind.BF16_DOT: 2}
INT = types.int64


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    found = builder.load(_at(builder, address, kind))
    found.align = align
    return found


def _entry(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    """The pointer to an entry of an array; LLVM sees that neighbours are neighbours, which it does not in sums of addresses."""
    return builder.gep(_at(builder, base, kind), [index])


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    wanted = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, wanted, name), args)


@intrinsic
def address(typingctx: Any, pointer: Any) -> Any:
    """The address a C function was given."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], _I64)

    return INT(types.voidptr), codegen


@intrinsic
def take(typingctx: Any, counter: Any) -> Any:
    """Add 1 to an int64 for all threads to see, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, args[0], _I64), _I64(1), "monotonic")

    return INT(INT), codegen


@intrinsic
def call(typingctx: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """Call the C function ``void (int64, int64, int64)`` that stands at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wanted = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        builder.call(_at(builder, args[0], wanted), args[1:])
        return context.get_dummy_value()

    return types.void(INT, INT, INT, INT), codegen


def _loader(kind: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, base: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            found = builder.load(_entry(builder, args[0], args[1], kind))
            return found if kind is _I64 else builder.zext(found, _I64)

        return INT(INT, INT), codegen

    return load


load_i64, load_i32, load_u16, load_u8 = (_loader(kind) for kind in (_I64, _I32, _I16, _I8))


def _from_half(builder: Any, raw: Any) -> Any:
    """A float16's bits as float32. Without F16C LLVM would call a function for it that is in no library here."""
    if platform.machine() not in ("x86_64", "AMD64") or "f16c" in cpu_features():
        return builder.fpext(builder.bitcast(raw, ir.HalfType()), _F32)
    bits = builder.zext(raw, _I32)
    moved = builder.bitcast(builder.shl(builder.and_(bits, _I32(0x7FFF)), _I32(13)), _F32)
    size = builder.bitcast(builder.fmul(moved, _F32(2.0**112)), _I32)  # exponents begin 112 later; subnormals come right too
    endless = builder.icmp_unsigned(">=", builder.and_(bits, _I32(0x7FFF)), _I32(0x7C00))  # infinite, or NaN
    size = builder.select(endless, builder.or_(size, _I32(0x7F800000)), size)
    return builder.bitcast(builder.or_(size, builder.shl(builder.and_(bits, _I32(0x8000)), _I32(16))), _F32)


@intrinsic
def load_float(typingctx: Any, base: Any, index: Any, kind: Any) -> Any:
    """Entry ``index`` of an array of `Kind` ``kind`` (known only at run time), as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, index, kind = args
        result = cgutils.alloca_once(builder, _F32)
        wide = builder.icmp_signed("==", kind, _I64(Kind.F32))
        with builder.if_else(wide) as (then, otherwise):
            with then:
                builder.store(builder.load(_entry(builder, base, index, _F32)), result)
            with otherwise:
                raw = builder.load(_entry(builder, base, index, _I16))
                half = _from_half(builder, raw)
                brain = builder.bitcast(builder.shl(builder.zext(raw, _I32), _I32(16)), _F32)
                builder.store(builder.select(builder.icmp_signed("==", kind, _I64(Kind.F16)), half, brain), result)
        return builder.load(result)

    return types.float32(INT, INT, INT), codegen


@intrinsic
def load_f32(typingctx: Any, base: Any, index: Any) -> Any:
    """Entry ``index`` of a float32 array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_entry(builder, args[0], args[1], _F32))

    return types.float32(INT, INT), codegen


@intrinsic
def store_f32(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _entry(builder, args[0], args[1], _F32))
        return context.get_dummy_value()

    return types.void(INT, INT, types.float32), codegen


@intrinsic
def halves_dot(typingctx: Any, codes: Any, zero: Any, low: Any, high: Any) -> Any:
    """Σ (q − z)·x over 16 integers of 4 bits: 8 bytes' low halves with 8 float32 at ``low``, their high ones at ``high``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = _load(builder, args[0], ir.VectorType(_I8, 8), 1)
        wide, floats = ir.VectorType(_I32, 8), ir.VectorType(_F32, 8)
        pairs = builder.zext(raw, wide)
        nibbles = builder.and_(pairs, ir.Constant(wide, [15] * 8)), builder.lshr(pairs, ir.Constant(wide, [4] * 8))
        first = builder.insert_element(ir.Constant(floats, ir.Undefined), args[1], _I32(0))
        zeros = builder.shuffle_vector(first, first, ir.Constant(wide, [0] * 8))
        total = None
        for codes, at in zip(nibbles, args[2:], strict=True):
            own = builder.fsub(builder.sitofp(codes, floats), zeros)
            product = builder.fmul(own, _load(builder, at, floats, 4), flags=("contract",))
            total = product if total is None else builder.fadd(total, product, flags=("contract",))
        wanted = ir.FunctionType(_F32, [_F32, floats])
        add = cgutils.get_or_insert_function(builder.module, wanted, "llvm.vector.reduce.fadd.v8f32")
        return builder.call(add, [ir.Constant(_F32, -0.0), total], fastmath=("reassoc",))

    return types.float32(INT, types.float32, INT, INT), codegen


@intrinsic
def copy_bits(typingctx: Any, to: Any, i: Any, source: Any, j: Any, size: Any) -> Any:
    """Copy entry j of ``source`` to entry i of ``to``; entries are ``size`` (2 or 4) bytes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, i, source, j, size = args
        with builder.if_else(builder.icmp_signed("==", size, _I64(4))) as (then, otherwise):
            with then:
                builder.store(builder.load(_entry(builder, source, j, _I32)), _entry(builder, to, i, _I32))
            with otherwise:
                builder.store(builder.load(_entry(builder, source, j, _I16)), _entry(builder, to, i, _I16))
        return context.get_dummy_value()

    return types.void(INT, INT, INT, INT, INT), codegen


@intrinsic
def clear_bits(typingctx: Any, to: Any, i: Any, size: Any) -> Any:
    """Set entry i of ``to`` to zero; entries are ``size`` (2 or 4) bytes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, i, size = args
        with builder.if_else(builder.icmp_signed("==", size, _I64(4))) as (then, otherwise):
            with then:
                builder.store(_I32(0), _entry(builder, to, i, _I32))
            with otherwise:
                builder.store(_I16(0), _entry(builder, to, i, _I16))
        return context.get_dummy_value()

    return types.void(INT, INT, INT), codegen


@intrinsic
def lowest(typingctx: Any, word: Any) -> Any:
    """The index of the lowest bit that is set, of a word that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return INT(INT), codegen


@intrinsic
def prefetch(typingctx: Any, at: Any) -> Any:
    """Have the cache line at an address, any address, brought near."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wanted = ir.FunctionType(ir.VoidType(), [ir.PointerType(_I8), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0")
        builder.call(function, [_at(builder, args[0], _I8), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(INT), codegen


@intrinsic
def ones(typingctx: Any, word: Any) -> Any:
    """How many bits of a word are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.ctpop.i64", _I64, args[0])

    return INT(INT), codegen
