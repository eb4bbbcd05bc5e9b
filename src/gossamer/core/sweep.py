"""Sweep: prune column by column, the columns to come making up for the error; what SparseGPT is, and others are built on."""

import torch
from torch import Tensor

from gossamer.core.pattern import NM, Pattern, kept
from gossamer.core.stats import Stats


@torch.no_grad()
def sweep(w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None, damp: float, block: int) -> tuple[Tensor, Tensor]:
    """Return the weight pruned under a pattern by the inverse Hessian of its inputs, and the mask; see `SparseGPT`.

    Args:
        w: (out, in); sums are in float32, the result is in its dtype.
        stats: of its inputs, with the Gram matrix.
        pattern: `Unstructured` or `NM`.
        damp: a fraction of the Hessian's mean diagonal.
        block: how many columns choose their mask together.
    """
    upper, dead, _ = stats.inverse_factor(damp)
    rows, columns = w.shape
    sparsity = pattern.resolve(sparsity)
    pattern.check(w.shape)
    wt = w.float().T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of W is one contiguous row
    wt[dead] = 0
    mask = torch.ones_like(wt, dtype=torch.bool)
    step = max(block // pattern.m, 1) * pattern.m if isinstance(pattern, NM) else block
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        u = upper[start:stop, start:stop]
        tile, keep = wt[start:stop], mask[start:stop]
        dropped = torch.zeros_like(tile)  # 1 / U_jj where an entry goes, 0 where it stays: w times this is its error
        error = torch.empty_like(tile)
        if not isinstance(pattern, NM):
            # Each block's share of the exact total: what is due up to its end less what was due up to its start.
            units = rows if getattr(pattern, "per", None) != "row" else 1
            assert sparsity is not None
            due = kept(sparsity, units * stop) - kept(sparsity, units * start)
            keep[:] = _select(tile, u, pattern, 1 - due / (units * (stop - start))) if due else False
            torch.div(~keep, u.diagonal()[:, None], out=dropped)
        for j, (w_j, error_j, dropped_j) in enumerate(zip(tile.unbind(), error.unbind(), dropped.unbind(), strict=True)):
            if isinstance(pattern, NM) and j % pattern.m == 0:  # a group is chosen once the sweep has reached it
                group = slice(j, j + pattern.m)
                keep[group] = _select(tile[group], u[group, group], pattern, None)
                torch.div(~keep[group], u.diagonal()[group, None], out=dropped[group])
            torch.mul(w_j, dropped_j, out=error_j)
            tile[j + 1 :].addr_(u[j, j + 1 :], error_j, alpha=-1)
        wt[stop:].addmm_(upper[start:stop, stop:].T, error, alpha=-1)
    return wt.T.masked_fill(~mask.T, 0).to(w.dtype).contiguous(), mask.T.contiguous()


def _select(tile: Tensor, u: Tensor, pattern: Pattern, sparsity: float | None) -> Tensor:
    """Choose the mask of some columns, (columns, out), by their saliency w² / U_jj²."""
    saliency = (tile / u.diagonal()[:, None]).square_()
    return pattern.select(saliency.T, sparsity).T
