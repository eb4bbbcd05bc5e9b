"""Products of rows under a mask in AVX2, unrolled with their sums in registers, for Numba to call.

AVX2 cannot load under a mask what lies together, so eight values are loaded, and a table says for each byte of the mask which
of them goes to which column.
"""

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gossamer.kernels._simd import _F32, _I8, _I16, _I32, _I64, _SIZE, INT, Kind, _at, _call, _load

LANES = 8  # columns at a time, and values that are loaded: as many are read from where a row's last ones begin
_F32x8, _I32x8, _I8x16 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_I8, 16)
KINDS = (Kind.F32, Kind.F16, Kind.BF16)

# Rows and inputs multiplied together, whose sums, spread values and an input have to fit into 16 registers.
TILES = ((1, 1), (4, 1), (1, 4), (2, 4), (1, 8))


def _order(byte: int) -> list[int]:
    """For each column which of the values belongs there, and where none does a negative number."""
    return [(byte & ((1 << j) - 1)).bit_count() if byte >> j & 1 else -LANES for j in range(LANES)]


def _table(builder: Any, size: int) -> Any:
    """Return the address of a table: for each byte of a mask the order that puts values of ``size`` bytes in their columns.

    It is told float by float, or for 16 bits byte by byte, as the instructions want it.
    """
    name = f"gossamer.order{size}"
    if name not in builder.module.globals:
        orders = [_order(byte) for byte in range(256)]
        if size == 2:
            orders = [[2 * value + i for value in order for i in range(2)] for order in orders]
        row = ir.ArrayType(_I8 if size == 2 else _I32, len(orders[0]))
        made = ir.GlobalVariable(builder.module, ir.ArrayType(row, 256), name)
        made.linkage, made.global_constant, made.align = "internal", True, 32
        made.initializer = ir.Constant(made.value_type, [ir.Constant(row, order) for order in orders])
    return builder.ptrtoint(builder.module.globals[name], _I64)


def _spread(builder: Any, kind: Kind, table: Any, pointer: Any, byte: Any) -> Any:
    """The values at ``pointer`` spread to the set bits of ``byte``: 8 float32."""
    if kind == Kind.F32:
        order = _load(builder, builder.add(table, builder.shl(byte, _I64(5))), _I32x8, 32)
        moved = _call(builder, "llvm.x86.avx2.permps", _F32x8, _load(builder, pointer, _F32x8, 1), order)
        none = builder.icmp_signed("<", order, ir.Constant(_I32x8, None))
        return builder.select(none, ir.Constant(_F32x8, None), moved)  # what was loaded of other rows may be NaN
    order = _load(builder, builder.add(table, builder.shl(byte, _I64(4))), _I8x16, 16)
    moved = _call(builder, "llvm.x86.ssse3.pshuf.b.128", _I8x16, _load(builder, pointer, _I8x16, 1), order)
    if kind == Kind.F16:
        return builder.fpext(builder.bitcast(moved, ir.VectorType(ir.HalfType(), LANES)), _F32x8)
    wide = builder.zext(builder.bitcast(moved, ir.VectorType(_I16, LANES)), _I32x8)
    return builder.bitcast(builder.shl(wide, ir.Constant(_I32x8, [16] * LANES)), _F32x8)


@intrinsic
def masked_dot(
    typingctx: Any, kind: Any, rows: Any, batch: Any, apart: Any, bits: Any, stride: Any, values: Any, offsets: Any, x: Any,
    x_stride: Any, columns: Any, y: Any, y_stride: Any,
) -> Any:  # fmt: skip
    """The product of some rows of a bitmask with some inputs, one of `TILES`: y[b, r] = Σ_j w[r, j] x[b, j].

    x is float32 and zero up to the next multiple of 8 columns; y is float32. `LANES` values have to be readable from each row's
    last one on. Arguments as in `_avx512`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        asked, operands = args[:3], args[3:]
        for k, (r, b) in product(KINDS, TILES):
            equal = [builder.icmp_signed("==", a, _I64(int(c))) for a, c in zip(asked, (k, r, b), strict=True)]
            with builder.if_then(builder.and_(equal[0], builder.and_(equal[1], equal[2]))):
                _masked_dot(builder, k, r, b, *operands)
        return context.get_dummy_value()

    return types.void(*[INT] * 13), codegen


def _masked_dot(
    builder: Any, kind: Kind, rows: int, batch: int, apart: Any, bits: Any, stride: Any, values: Any, offsets: Any, x: Any,
    x_stride: Any, columns: Any, y: Any, y_stride: Any,
) -> None:  # fmt: skip
    size = _SIZE[kind]
    table = _table(builder, size)
    sums = {k: cgutils.alloca_once_value(builder, ir.Constant(_F32x8, None)) for k in product(range(rows), range(batch))}
    each = [builder.mul(apart, _I64(r)) for r in range(rows)]
    lines = [builder.add(bits, builder.mul(stride, r)) for r in each]
    begins = [_load(builder, builder.add(offsets, builder.mul(r, _I64(8))), _I64, 8) for r in each]
    at = [cgutils.alloca_once_value(builder, builder.add(values, builder.mul(b, _I64(size)))) for b in begins]  # the next value
    starts = [builder.add(x, builder.mul(x_stride, _I64(b))) for b in range(batch)]
    with cgutils.for_range(builder, builder.sdiv(builder.add(columns, _I64(LANES - 1)), _I64(LANES))) as loop:
        spread = []
        for a, line in zip(at, lines, strict=True):
            byte = builder.zext(_load(builder, builder.add(line, loop.index), _I8, 1), _I64)
            pointer = builder.load(a)
            spread.append(_spread(builder, kind, table, pointer, byte))
            count = _call(builder, "llvm.ctpop.i64", _I64, byte)
            builder.store(builder.add(pointer, builder.mul(count, _I64(size))), a)
        for b, start in enumerate(starts):
            xb = _load(builder, builder.add(start, builder.mul(loop.index, _I64(4 * LANES))), _F32x8, 4)
            for r in range(rows):
                total = _call(builder, "llvm.fma.v8f32", _F32x8, spread[r], xb, builder.load(sums[r, b]))
                builder.store(total, sums[r, b])
    wanted = ir.FunctionType(_F32, [_F32, _F32x8])
    summed = cgutils.get_or_insert_function(builder.module, wanted, "llvm.vector.reduce.fadd.v8f32")
    for r, b in product(range(rows), range(batch)):
        total = builder.call(summed, [_F32(0.0), builder.load(sums[r, b])], fastmath=("reassoc",))
        to = builder.add(builder.add(y, builder.mul(y_stride, _I64(b))), builder.mul(each[r], _I64(4)))
        builder.store(total, _at(builder, to, _F32))
