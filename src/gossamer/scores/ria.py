"""RIA: relative importance and activations."""

from typing import ClassVar

from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class RIA(Score):
    """S_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^a (Zhang et al., ICLR 2024, "Plug-and-Play").

    A weight counts by its share of its input column and of its output row, so that no channel is pruned away whole.
    W has shape (out, in); a = ``power``.

    >>> import torch
    >>> stats = Stats(2)
    >>> stats.add(torch.ones(1, 2))
    >>> RIA()(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), stats)
    tensor([[0.7500, 1.5000],
            [1.0000, 0.7500]])
    """

    power: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"norm"})

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        size = x.float().abs()
        column = size.sum(0, keepdim=True).clamp_min(1e-30)
        row = size.sum(1, keepdim=True).clamp_min(1e-30)
        return (size / column + size / row) * stats.norm**self.power
