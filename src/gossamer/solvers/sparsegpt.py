"""SparseGPT: prune column by column, and let the columns to come make up for the error."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern, Unstructured
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats
from gossamer.kernels.sweep import sweep


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
        return sweep(w, stats, pattern, sparsity, self.damp, self.block)
