"""x Wᵀ for a tiled bitmask and many inputs on a Hopper GPU: how the work of `_hopper` is cut, and its inputs' order."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gossamer.kernels._gpu import added, multiprocessors, partial
from gossamer.kernels.tiled import _hopper
from gossamer.kernels.tiled.layout import COLUMNS, blocks

WARPS = 8  # rows of blocks of a program
TOKENS = 256  # inputs of a program: as many as the registers of half its warps hold the sums of, for their 64 rows
DEEP = _hopper.DEEP.value  # columns of a step
SHARED = 232448  # bytes of shared memory that a program may have
STAGES = 4  # of inputs, at most
SIDE = tl.constexpr(1024)  # columns that a program puts in order


def product(x: Tensor, values: Tensor, bits: Tensor, begins: Tensor, levels: int, out: int) -> Tensor:
    """Return x Wᵀ, (batch, out), for x of (batch, in) and values in one dtype of 16 bits, on a Hopper GPU."""
    batch, columns = x.shape
    down, across = blocks((out, columns))
    words, stages = room(levels)
    parts = shares(-(-down // WARPS) * -(-batch // TOKENS), across, multiprocessors(x.device))
    y = partial(parts, batch, out, x)
    swizzled = gl.NVMMASharedLayout(128, 16, 2)
    inputs = TensorDescriptor.from_tensor(ordered(x, across * COLUMNS), [TOKENS, DEEP], swizzled)
    _hopper.multiply[(-(-batch // TOKENS), -(-down // WARPS), parts)](
        inputs, bits, values, begins, y, out, across, down, batch, levels, stages, words, WARPS, TOKENS, num_warps=WARPS
    )
    return added(y, x.dtype)


def room(levels: int) -> tuple[int, int]:
    """Return how many stages' room the columns of words take, and how many stages of inputs there are."""
    stage = TOKENS * DEEP * 2
    words = -(-WARPS * (2 * levels + 5) * 128 // stage)
    return words, min((SHARED - 64) // stage - words, STAGES)


def shares(tiles: int, across: int, at_once: int) -> int:
    """Return into how many parts each sum is cut for the programs, of which a multiprocessor runs one, to end together."""

    def time(parts: int) -> float:
        # The time, in that of a program's block: it begins and ends in that of another, and parts have to be added up.
        adding = 1.5 + 0.035 * tiles * parts if parts > 1 else 0.0
        return -(-tiles * parts // at_once) * (-(-across // parts) + 1) + adding

    return min(range(1, min(across, 16) + 1), key=time)


def ordered(x: Tensor, wide: int) -> Tensor:
    """Return inputs in the order in which the operand has the columns of each 32, (batch, wide), zeros after the last."""
    x = x.contiguous()
    to = torch.empty(len(x), wide, dtype=x.dtype, device=x.device)
    _order[(len(x), triton.cdiv(wide, SIDE.value))](x, to, x.shape[1], wide)
    return to


@triton.jit
def _order(x, to, columns, wide):
    i = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    # Of 32 columns: a lane t has eight, of which the first four are the first product's 2t, 2t + 1, 2t + 8 and 2t + 9.
    column = i // 32 * 32 + i // 2 % 4 * 8 + i // 16 % 2 * 4 + i // 8 % 2 * 2 + i % 2
    row = tl.program_id(0).to(tl.int64)
    there = tl.load(x + row * columns + column, mask=column < columns, other=0.0)
    tl.store(to + row * wide + i, there, mask=i < wide)
