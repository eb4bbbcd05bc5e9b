"""One block of columns on a GPU: a program holds all of them for some rows, which do not depend on one another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = tl.constexpr(16)  # rows of W a program takes


def columnwise(tile: Tensor, keep: Tensor, u: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Go through the columns of a block in one launch; as the reference does."""
    columns, rows = tile.shape
    error = torch.empty_like(tile)
    n, m = group or (0, 0)
    with torch.cuda.device(tile.device):
        _sweep[(triton.cdiv(rows, ROWS.value),)](
            tile, keep.view(torch.uint8), u.contiguous(), error, rows, columns, n, m, triton.next_power_of_2(columns)
        )
    return error


@triton.jit
def _sweep(tile, keep, upper, error, rows, columns, n: tl.constexpr, m: tl.constexpr, WIDE: tl.constexpr):
    c = tl.arange(0, WIDE)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = c < columns
    live = here[:, None] & (r < rows)[None, :]
    at = c.to(tl.int64)[:, None] * rows + r[None, :]
    w = tl.load(tile + at, mask=live, other=0.0)
    stays = tl.load(keep + at, mask=live, other=1) != 0
    diagonal = tl.load(upper + c * (columns + 1), mask=here, other=1.0)[:, None]
    inverse = tl.div_rn(tl.full([WIDE, 1], 1.0, tl.float32), diagonal)
    dropped = tl.where(stays, 0.0, inverse)  # w times this is its error
    for j in range(columns):
        if m > 0:  # noqa: SIM102 (decided when it is compiled)
            if j % m == 0:  # an entry's rank is how many of its group beat it; an earlier equal one does
                saliency = tl.div_rn(w, diagonal + tl.zeros_like(w))
                saliency = saliency * saliency
                rank = tl.zeros([WIDE, ROWS], tl.int32)
                for i in range(j, j + m):
                    rival = tl.sum(tl.where((c == i)[:, None], saliency, 0.0), 0)[None, :]
                    rank += ((rival > saliency) | ((rival == saliency) & (c > i)[:, None])).to(tl.int32)
                inside = ((c >= j) & (c < j + m))[:, None]
                dropped = tl.where(inside, tl.where(rank < n, 0.0, inverse), dropped)
                w = tl.where(inside & (saliency - saliency != 0.0), float("nan"), w)  # not finite: seen once all is done
        e = tl.sum(tl.where((c == j)[:, None], w * dropped, 0.0), 0)
        later = tl.load(upper + j * columns + c, mask=here & (c > j), other=0.0)
        w -= later[:, None] * e[None, :]
    tl.store(tile + at, w, mask=live)
    tl.store(error + at, w * dropped, mask=live)
    tl.store(keep + at, (dropped == 0.0).to(tl.uint8), mask=live)
