"""Magnitude: |w|."""

from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Magnitude(Score):
    """S = |w| (Han et al., 2015, arXiv:1506.02626). Data-free.

    >>> import torch
    >>> Magnitude()(torch.tensor([[-2.0, 1.0]]), Stats(2))
    tensor([[2., 1.]])
    """

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        return x.float().abs()
