"""SparseGPT: prune column by column, and let the columns to come make up for the error."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern, Unstructured, kept
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class SparseGPT(Solver):
    """Minimise ‖W X − Ŵ X‖² by a sweep over the columns (Frantar and Alistarh, 2023, arXiv:2301.00774).

    With H = X Xᵀ + λ·mean(diag)·I and H⁻¹ = Uᵀ U, column j's saliency is w_j² / U_jj²; the least salient entries of each block
    of columns are set to zero, and the error e = (w_j − ŵ_j) / U_jj is taken off the later columns: W_:,k ← W_:,k − e · U_jk.

    Args:
        damp: λ, as a fraction of H's mean diagonal; raised until the factorisation succeeds (reported as ``damp``).
        block: how many columns choose their mask together and propagate lazily (a multiple of m is used for n:m).

    W has shape (out, in); sums are in float32, the result is cast back to W's dtype.

    >>> stats = Stats(2, gram=True)
    >>> stats.add(torch.ones(8, 2))  # two inputs that are always equal: the weight that stays takes over the other's work
    >>> SparseGPT(damp=1e-4)(torch.tensor([[1.0, 2.0]]), stats, Unstructured(), 0.5)[0].round(decimals=2)
    tensor([[0., 3.]])
    """

    damp: float = 0.01
    block: int = 128
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM)

    def __post_init__(self) -> None:
        if not self.damp > 0 or self.block < 1:
            raise GossamerError(f"SparseGPT wants damp > 0 and block >= 1; got damp={self.damp!r}, block={self.block!r}")

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        upper, dead, _ = stats.inverse_factor(self.damp)
        rows, columns = w.shape
        sparsity = pattern.resolve(sparsity)
        pattern.check(w.shape)
        wt = w.float().T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of W is one contiguous row
        wt[dead] = 0
        mask = torch.ones_like(wt, dtype=torch.bool)
        step = max(self.block // pattern.m, 1) * pattern.m if isinstance(pattern, NM) else self.block
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
