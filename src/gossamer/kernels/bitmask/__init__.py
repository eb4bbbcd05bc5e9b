"""x Wᵀ for W as a bitmask: one bit a position and the kept values, row by row."""

import torch
from torch import Tensor

from gossamer.kernels._choice import choose, needs_gradient
from gossamer.kernels._inputs import flat
from gossamer.kernels.bitmask import reference

KERNELS = ("triton", "avx512", "avx2", "portable", "reference")

torch.library.define(
    "gossamer::bitmask_linear",
    "(Tensor x, Tensor values, Tensor bits, Tensor offsets, int columns, str kernel) -> Tensor",
)


@torch.library.impl("gossamer::bitmask_linear", "default")
def _compute(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int, kernel: str) -> Tensor:
    kernel = choose(kernel, x.device, KERNELS)
    if kernel == "triton":
        from gossamer.kernels.bitmask import triton

        return triton.product(x, values, bits, offsets, columns)
    if kernel == "reference":
        return reference.linear(x, values, bits, offsets, columns)
    from gossamer.kernels.bitmask import cpu

    return cpu.product(x, values, bits, offsets, columns, kernel)


@torch.library.register_fake("gossamer::bitmask_linear")
def _shape(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int, kernel: str) -> Tensor:
    return x.new_empty(x.shape[0], bits.shape[0])


def linear(x: Tensor, values: Tensor, bits: Tensor, offsets: Tensor, columns: int, kernel: str = "auto") -> Tensor:
    """Return x Wᵀ.

    Args:
        x: (..., in), a float dtype.
        values: (nnz,), bfloat16, float16 or float32.
        bits: uint8 (out, ⌈in / 8⌉), bit j of byte k is column 8k + j.
        offsets: int64 (out + 1,), where each row's values begin.
        columns: in.
        kernel: which implementation; "auto" takes the fastest there is. Where a gradient is wanted, it is the reference.

    Returns:
        (..., out) in x's dtype; sums in float32.
    """
    rows = flat(x, columns)
    if needs_gradient(x, values):
        y = reference.linear(rows, values, bits, offsets, columns)
    else:
        y = torch.ops.gossamer.bitmask_linear(rows, values, bits, offsets, columns, kernel)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])
