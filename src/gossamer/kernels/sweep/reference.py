"""One block of columns, a column at a time, by torch: on any device."""

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.pattern import NM

# tile, keep, u, (n, m) or None: the error of each column
Columnwise = Callable[[Tensor, Tensor, Tensor, tuple[int, int] | None], Tensor]


def columnwise(tile: Tensor, keep: Tensor, u: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Go through the columns of a block; each one's error is taken off those after it.

    e_j = w_j / u_jj where the entry goes, 0 where it stays; w_k ← w_k − u_jk · e_j for k > j.

    Args:
        tile: (block, out) float32, the block's columns; updated in place.
        keep: (block, out) bool, which entries stay; for groups it is chosen here, when the sweep has reached each group.
        u: (block, block), upper triangular.
        group: n and m of n:m, or None.

    Returns:
        (block, out): e.
    """
    diagonal = u.diagonal()[:, None]
    error = torch.empty_like(tile)
    dropped = torch.where(keep, 0.0, 1 / diagonal)  # w times this is its error
    for j, (w_j, error_j, dropped_j) in enumerate(zip(tile.unbind(), error.unbind(), dropped.unbind(), strict=True)):
        if group is not None and j % group[1] == 0:
            those = slice(j, j + group[1])
            keep[those] = NM(*group).select((tile[those] / diagonal[those]).square_().T).T
            dropped[those] = torch.where(keep[those], 0.0, 1 / diagonal[those])
        torch.mul(w_j, dropped_j, out=error_j)
        tile[j + 1 :].addr_(u[j, j + 1 :], error_j, alpha=-1)
    return error
