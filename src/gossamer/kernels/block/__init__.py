"""x Wᵀ for W of dense tiles: their values, and the column at which each begins."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels._choice import choose, needs_gradient
from gossamer.kernels._inputs import flat
from gossamer.kernels.block import reference

KERNELS = ("triton", "portable", "reference")

torch.library.define(
    "gossamer::block_linear", "(Tensor x, Tensor values, Tensor columns, Tensor offsets, int[] shape, str kernel) -> Tensor"
)


@torch.library.impl("gossamer::block_linear", "default")
def _compute(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int], kernel: str) -> Tensor:
    kernel = choose(kernel, x.device, KERNELS)
    if kernel == "triton":
        from gossamer.kernels.block import triton

        return triton.product(x, values, columns, offsets, shape)
    if kernel == "reference":
        return reference.linear(x, values, columns, offsets, shape)
    from gossamer.kernels.block import cpu

    return cpu.product(x, values, columns, offsets, shape)


@torch.library.register_fake("gossamer::block_linear")
def _shape(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int], kernel: str) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


def linear(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int], kernel: str = "auto") -> Tensor:
    """Return x Wᵀ, (..., out) in x's dtype for x of (..., in), sums in float32.

    Args:
        x: (..., in), a float dtype.
        values: (tiles, h, w), bfloat16, float16 or float32.
        columns: int32 (tiles,), the column of tiles of each.
        offsets: int64 (out / h + 1,), where each row of tiles begins.
        shape: (out, in).
        kernel: which implementation; "auto" takes the fastest there is. Where a gradient is wanted, it is the reference.
    """
    rows = flat(x, shape[1])
    if needs_gradient(x, values):
        y = reference.linear(rows, values, columns, offsets, shape)
    else:
        y = torch.ops.gossamer.block_linear(rows, values, columns, offsets, shape, kernel)
    return y.view(*x.shape[:-1], y.shape[-1])
