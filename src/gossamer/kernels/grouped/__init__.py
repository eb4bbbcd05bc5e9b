"""x Wᵀ for W of tiles on 4-bit grids: s·(q − z), and the column of tiles at which each stands."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels._choice import choose, needs_gradient
from gossamer.kernels._inputs import flat
from gossamer.kernels.grouped import reference

KERNELS = ("portable", "reference")

torch.library.define(
    "gossamer::grouped_linear",
    "(Tensor x, Tensor values, Tensor scale, Tensor zero, Tensor columns, Tensor offsets, int[] shape, int[] tile, str kernel)"
    " -> Tensor",
)


@torch.library.impl("gossamer::grouped_linear", "default")
def _compute(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
    kernel: str,
) -> Tensor:
    if choose(kernel, x.device, KERNELS) == "reference":
        return reference.linear(x, values, scale, zero, columns, offsets, shape, tile)
    from gossamer.kernels.grouped import cpu

    return cpu.product(x, values, scale, zero, columns, offsets, shape, tile)


@torch.library.register_fake("gossamer::grouped_linear")
def _shape(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
    kernel: str,
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


def linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    columns: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    tile: Sequence[int],
    kernel: str = "auto",
) -> Tensor:
    """Return x Wᵀ, (..., out) in x's dtype for x of (..., in), s·(q − z) and sums in float32.

    Args:
        x: (..., in), a float dtype.
        values: uint8 (tiles, ⌈h·w / 2⌉), entry j of a tile in byte j's low half, or in byte (j − ⌈h·w / 2⌉)'s high half.
        scale: (tiles,), bfloat16, float16 or float32.
        zero: uint8 (tiles,).
        columns: int16 (tiles,), the column of tiles of each.
        offsets: int64 (out / h + 1,), where each row of tiles begins.
        shape: (out, in).
        tile: (h, w).
        kernel: which implementation; "auto" takes the fastest there is. Where a gradient is wanted, it is the reference.
    """
    rows = flat(x, shape[1])
    if needs_gradient(x, scale):
        y = reference.linear(rows, values, scale, zero, columns, offsets, shape, tile)
    else:
        y = torch.ops.gossamer.grouped_linear(rows, values, scale, zero, columns, offsets, shape, tile, kernel)
    return y.view(*x.shape[:-1], y.shape[-1])
