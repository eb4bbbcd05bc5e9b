"""What the GPU's products share: their operands, the sum of parts, and the way by dense rows for many inputs."""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 64  # inputs that a kernel multiplies with; for more, the weight is made dense
RESIDENT = 8  # programs a multiprocessor is given, about: some at a time, and then some more
SIDE = tl.constexpr(512)  # sums that a program adds up the parts of


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def operands(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and values in one dtype, float32 where they differ, in one stretch each, aligned for the widest loads."""
    if x.dtype != values.dtype:
        x, values = x.float(), values.float()
    return aligned(x), aligned(values)


def aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def shares(programs: int, most: int, device: torch.device) -> int:
    """Return into how many parts each sum is cut, a power of 2 and at most ``most``, to give every multiprocessor work."""
    wanted = RESIDENT * multiprocessors(device) // max(programs, 1)
    return 1 << max(min(wanted, most).bit_length() - 1, 0)


def by_dense_rows(x: Tensor, shape: tuple[int, int], dtype: torch.dtype, expand: Callable[[Tensor], None]) -> Tensor:
    """Return x Wᵀ by way of W, which ``expand`` writes."""
    dense = torch.empty(shape, dtype=dtype, device=x.device)
    expand(dense)
    return torch.nn.functional.linear(x, dense)


def partial(count: int, batch: int, out: int, x: Tensor) -> Tensor:
    """Return room for the parts of each sum, (count, batch, out): float32, or x's dtype where one part is the whole."""
    return torch.empty(count, batch, out, dtype=torch.float32 if count > 1 else x.dtype, device=x.device)


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over the first dimension of `partial`'s (count, batch, out): (batch, out) in ``dtype``."""
    count, batch, out = parts.shape
    if count == 1:
        return parts[0].to(dtype)
    y = torch.empty(batch, out, dtype=dtype, device=parts.device)
    _add[(triton.cdiv(out, SIDE.value), batch)](parts, y, count, out)
    return y


@triton.jit(do_not_specialize=["count"])
def _add(parts, y, count, out):
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    b = tl.program_id(1).to(tl.int64)
    total = tl.zeros([SIDE], tl.float32)
    for part in range(count):
        total += tl.load(parts + (part * tl.num_programs(1) + b) * out + row, mask=row < out, other=0.0)
    tl.store(y + b * out + row, total.to(y.dtype.element_ty), mask=row < out)
