"""ScaleLoRA: every kept entry is scaled by an entry of a low-rank matrix."""

from typing import ClassVar

from torch import nn

from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._adapted import adapted


@spec
class ScaleLoRA(Tuner):
    """Train B and A in W' = W ⊙ (BA), and merge them: what is zero stays zero.

    B has shape (out, rank), A (rank, in); BA is 1 everywhere at the start.

    Raises:
        GossamerError: the model has no zeros to keep, or a rank below 1.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> ScaleLoRA(rank=8)
    ScaleLoRA(rank=8)
    """

    rate: ClassVar[float] = 2e-3
    rank: int = 16

    def start(self, model: nn.Module, how: How) -> Tuning:
        return adapted(model, "ScaleLoRAConfig", how, r=self.rank)
