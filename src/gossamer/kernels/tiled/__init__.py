"""x Wᵀ for W as a bitmask in tensor cores' order (see formats/tiled.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels._choice import choose, needs_gradient
from gossamer.kernels._inputs import flat
from gossamer.kernels.tiled import reference
from gossamer.kernels.tiled.layout import LANES, PIECE, SHARE, arranged, begins, blocks, places

__all__ = ["KERNELS", "LANES", "PIECE", "SHARE", "arranged", "begins", "blocks", "linear", "places", "reference"]

KERNELS = ("triton", "portable", "reference")

torch.library.define(
    "gossamer::tiled_linear",
    "(Tensor x, Tensor values, Tensor bits, Tensor begins, int levels, int[] shape, str kernel) -> Tensor",
)


@torch.library.impl("gossamer::tiled_linear", "default")
def _compute(x: Tensor, values: Tensor, bits: Tensor, begins: Tensor, levels: int, shape: Sequence[int], kernel: str) -> Tensor:
    kernel = choose(kernel, x.device, KERNELS)
    if kernel == "triton":
        from gossamer.kernels.tiled import triton

        return triton.product(x, values, bits, begins, levels, shape)
    if kernel == "reference":
        return reference.linear(x, values, bits, shape)
    from gossamer.kernels.tiled import cpu

    return cpu.product(x, values, bits, begins, shape)


@torch.library.register_fake("gossamer::tiled_linear")
def _shape(x: Tensor, values: Tensor, bits: Tensor, begins: Tensor, levels: int, shape: Sequence[int], kernel: str) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


def linear(
    x: Tensor, values: Tensor, bits: Tensor, begins: Tensor, levels: int, shape: Sequence[int], kernel: str = "auto"
) -> Tensor:
    """Return x Wᵀ, (..., out) in x's dtype for x of (..., in), sums in float32.

    Args:
        x: (..., in), a float dtype.
        values, bits, begins, levels: as in `gossamer.formats.Tiled`.
        shape: (out, in).
        kernel: which implementation; "auto" takes the fastest there is. Where a gradient is wanted, it is the reference.
    """
    rows = flat(x, shape[1])
    if needs_gradient(x, values):
        y = reference.linear(rows, values, bits, shape)
    else:
        y = torch.ops.gossamer.tiled_linear(rows, values, bits, begins, levels, shape, kernel)
    return y.view(*x.shape[:-1], y.shape[-1])
