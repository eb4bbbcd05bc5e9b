"""Gradient: |w · g|, the first-order change of the loss."""

from typing import ClassVar

from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Gradient(Score):
    """S = |w · ∂L/∂w|, L the mean next-token loss over the calibration windows (Molchanov et al., 2017, arXiv:1611.06440).

    SNIP's connection sensitivity (Lee et al., 2019, arXiv:1810.02340) is this number over its sum over all weights, at
    initialisation: the same ranking, so SNIP is ``Gradient`` with allocate="global_", and has no class of its own.

    Needs one backward pass through the whole model, so the model has to fit in memory with a float32 gradient of each target.

    >>> import torch
    >>> stats = Stats(2)
    >>> stats.grad = torch.tensor([[0.5, -3.0]])
    >>> Gradient()(torch.tensor([[2.0, 1.0]]), stats)
    tensor([[1., 3.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        assert stats.grad is not None
        return (x.float() * stats.grad).abs()
