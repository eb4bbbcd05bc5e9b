"""x Wᵀ for W in slices of rows: a value and a step to its column for each entry (see formats/sliced.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels._choice import choose, needs_gradient
from gossamer.kernels._inputs import flat
from gossamer.kernels.sliced import reference
from gossamer.kernels.sliced.layout import CHUNK, ROWS, STEP

__all__ = ["CHUNK", "ROWS", "STEP", "linear", "reference"]

KERNELS = ("triton", "portable", "reference")

torch.library.define(
    "gossamer::sliced_linear",
    "(Tensor x, Tensor values, Tensor steps, Tensor bases, Tensor ends, Tensor order, int[] shape, str kernel) -> Tensor",
)


@torch.library.impl("gossamer::sliced_linear", "default")
def _compute(
    x: Tensor, values: Tensor, steps: Tensor, bases: Tensor, ends: Tensor, order: Tensor, shape: Sequence[int], kernel: str
) -> Tensor:
    kernel = choose(kernel, x.device, KERNELS)
    if kernel == "triton":
        from gossamer.kernels.sliced import triton

        return triton.product(x, values, steps, bases, ends, order, shape)
    if kernel == "reference":
        return reference.linear(x, values, steps, bases, ends, order, shape)
    from gossamer.kernels.sliced import cpu

    return cpu.product(x, values, steps, bases, ends, order, shape)


@torch.library.register_fake("gossamer::sliced_linear")
def _shape(
    x: Tensor, values: Tensor, steps: Tensor, bases: Tensor, ends: Tensor, order: Tensor, shape: Sequence[int], kernel: str
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


def linear(
    x: Tensor,
    values: Tensor,
    steps: Tensor,
    bases: Tensor,
    ends: Tensor,
    order: Tensor,
    shape: Sequence[int],
    kernel: str = "auto",
) -> Tensor:
    """Return x Wᵀ, (..., out) in x's dtype for x of (..., in), sums in float32.

    Args:
        x: (..., in), a float dtype.
        values, steps, bases, ends, order: as in `gossamer.formats.Sliced`.
        shape: (out, in).
        kernel: which implementation; "auto" takes the fastest there is. Where a gradient is wanted, it is the reference.
    """
    rows = flat(x, shape[1])
    if needs_gradient(x, values):
        y = reference.linear(rows, values, steps, bases, ends, order, shape)
    else:
        y = torch.ops.gossamer.sliced_linear(rows, values, steps, bases, ends, order, shape, kernel)
    return y.view(*x.shape[:-1], y.shape[-1])
