"""MaskLoRA: a low-rank update of the kept entries only."""

from typing import ClassVar

from torch import nn

from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._adapted import adapted


@spec
class MaskLoRA(Tuner):
    """Train B and A in W' = W + s·M⊙(BA), where M = (W ≠ 0) and s = alpha / rank, and merge them: zeros stay, to the bit.

    B has shape (out, rank), A (rank, in); B is zero at the start. Nothing of W's size is kept for the backward pass.

    Raises:
        GossamerError: the model has no zeros to keep, or a rank below 1.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> MaskLoRA(rank=8)
    MaskLoRA(rank=8)
    """

    rate: ClassVar[float] = 1e-3
    rank: int = 16
    alpha: float = 32

    def start(self, model: nn.Module, how: How) -> Tuning:
        return adapted(model, "MaskLoRAConfig", how, r=self.rank, alpha=self.alpha)
