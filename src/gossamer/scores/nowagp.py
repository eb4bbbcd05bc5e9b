"""NoWagP: the squared normalised weight times the energy of its input."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class NoWagP(Score):
    """S_ij = W̄_ij²·‖X_j‖₂², W̄_ij = W_ij / (c_j·r_i) (NoWag-P; Liu et al., 2025, arXiv:2504.14569).

    c_j = (Σ_i W_ij²)^½ is the norm of an input column, r_i = (Σ_j (W_ij / c_j)²)^½ then that of an output row. Each score is
    what dropping the entry adds to Σ (W̄ − Ŵ)²·‖X_j‖₂², the loss that `ARMOR` goes on from. W has shape (out, in).

    >>> stats = Stats(2)
    >>> stats.add(torch.tensor([[1.0, 2.0]]))
    >>> NoWagP()(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), stats).round(decimals=3)
    tensor([[1.0000, 0.0000],
            [0.3900, 2.4390]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm"})

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        w, least = x.float(), torch.finfo(torch.float32).tiny
        w = w / torch.linalg.vector_norm(w, dim=0).clamp_min(least)
        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(least)
        found: Tensor = (w * stats.norm).square()
        return found
