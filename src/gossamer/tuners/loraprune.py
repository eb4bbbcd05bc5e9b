"""LoRA-Prune: an ordinary LoRA while it trains, masked when it is merged."""

from typing import ClassVar

from torch import nn

from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._adapted import adapted


@spec
class LoRAPrune(Tuner):
    """Train B and A in W' = W + s·BA, with s = alpha / rank, and merge W + s·M⊙(BA), where M = (W ≠ 0).

    As fast as LoRA; what the update put where W is zero is dropped at the end, which `finish` warns of, with how much that is.

    Raises:
        GossamerError: the model has no zeros to keep, or a rank below 1.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> LoRAPrune(rank=8)
    LoRAPrune(rank=8)
    """

    rate: ClassVar[float] = 1e-3
    rank: int = 16
    alpha: float = 32

    def start(self, model: nn.Module, how: How) -> Tuning:
        return adapted(model, "LoRAPruneConfig", how, r=self.rank, alpha=self.alpha)
