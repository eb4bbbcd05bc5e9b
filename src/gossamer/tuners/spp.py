"""SPP: every kept entry is scaled by a row vector, shared by a group of outputs, times a factor of its own output."""

from typing import ClassVar

from torch import nn

from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._adapted import adapted


@spec
class SPP(Tuner):
    """Train α and β in W' = W + s·W ⊙ (repeat(α)·β), with s = alpha / rank, and merge them: what is zero stays zero.

    α has shape (rank, in), each of its rows repeated over out/rank outputs (or nearly); β (out, 1), zero at the start.

    Raises:
        GossamerError: the model has no zeros to keep, or a rank below 1 or above a weight's number of outputs.

    Source: SPP (Lu et al., 2024, arXiv:2405.16057).

    >>> SPP(rank=8)
    SPP(rank=8)
    """

    rate: ClassVar[float] = 1e-2
    rank: int = 16
    alpha: float = 32

    def start(self, model: nn.Module, how: How) -> Tuning:
        return adapted(model, "SPPConfig", how, r=self.rank, alpha=self.alpha)
