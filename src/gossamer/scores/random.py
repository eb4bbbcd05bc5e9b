"""Random: the baseline every method has to beat."""

import torch
from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Random(Score):
    """S ~ U(0, 1), the same for the same seed and shape on every device. Data-free.

    >>> import torch
    >>> bool((Random(1)(torch.zeros(2, 3), Stats(3)) == Random(1)(torch.ones(2, 3), Stats(3))).all())
    True
    """

    seed: int = 0

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(x.shape, generator=generator).to(x.device)
