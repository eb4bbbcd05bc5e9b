"""x Wᵀ for W with n of every m kept: the values, and where in their group each stands."""

import torch
from torch import Tensor

from gossamer.kernels._choice import choose, needs_gradient
from gossamer.kernels._inputs import flat
from gossamer.kernels.nm import reference

KERNELS = ("triton", "portable", "reference")

torch.library.define("gossamer::nm_linear", "(Tensor x, Tensor values, Tensor positions, int n, int m, str kernel) -> Tensor")


@torch.library.impl("gossamer::nm_linear", "default")
def _compute(x: Tensor, values: Tensor, positions: Tensor, n: int, m: int, kernel: str) -> Tensor:
    kernel = choose(kernel, x.device, KERNELS)
    if kernel == "triton":
        from gossamer.kernels.nm import triton

        return triton.product(x, values, positions, n, m)
    if kernel == "reference":
        return reference.linear(x, values, positions, n, m)
    from gossamer.kernels.nm import cpu

    return cpu.product(x, values, positions, n, m)


@torch.library.register_fake("gossamer::nm_linear")
def _shape(x: Tensor, values: Tensor, positions: Tensor, n: int, m: int, kernel: str) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def linear(x: Tensor, values: Tensor, positions: Tensor, n: int, m: int, kernel: str = "auto") -> Tensor:
    """Return x Wᵀ, (..., out) in x's dtype for x of (..., in), sums in float32.

    Args:
        x: (..., in), a float dtype.
        values: (out, in·n/m), bfloat16, float16 or float32.
        positions: uint8 (out, ⌈in·n/m·bits / 8⌉), 1, 2, 4 or 8 bits a value, the first in the lowest bits.
        n, m: how many of how many.
        kernel: which implementation; "auto" takes the fastest there is. Where a gradient is wanted, it is the reference.
    """
    rows = flat(x, values.shape[1] // n * m)
    if needs_gradient(x, values):
        y = reference.linear(rows, values, positions, n, m)
    else:
        y = torch.ops.gossamer.nm_linear(rows, values, positions, n, m, kernel)
    return y.view(*x.shape[:-1], y.shape[-1])
