"""Wanda: |w| times the norm of its input."""

from typing import ClassVar, Literal

from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Wanda(Score):
    """S_ij = |W_ij| · ‖X_j‖₂, compared within an output row (Sun et al., 2023, arXiv:2306.11695).

    W has shape (out, in); X_j is input feature j over all calibration tokens.

    >>> import torch
    >>> stats = Stats(2)
    >>> stats.add(torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
    >>> Wanda()(torch.tensor([[1.0, -2.0]]), stats)
    tensor([[5., 2.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm"})
    per: ClassVar[Literal["tensor", "row"]] = "row"

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        return x.float().abs() * stats.norm
