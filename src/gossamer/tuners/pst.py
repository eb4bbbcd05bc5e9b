"""PST: a mask that is learnt beside a low-rank update, both from few parameters, while the model becomes sparse."""

from typing import ClassVar

from torch import nn

from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._adapted import adapted


@spec
class PST(Tuner):
    """Train a dense model to W' = (W + β·UV) ⊙ M, where M keeps the best of S = |W + β·UV| + α1·AB + α2·(R1ᵀ + 1Cᵀ).

    U and A have shape (out, rank), V and B (rank, in), R out entries, C in. The gradient of M is taken for S's
    (straight-through). The sparsity rises from 0 by a cubic schedule, between ``warmup`` and ``cooldown``, parts of the steps.

    Raises:
        GossamerError: a pattern that does not fit the weights, or a rank below 1.

    Source: PST (Li et al., 2022, arXiv:2205.11005).

    >>> PST(rank=4)
    PST(rank=4)
    """

    rate: ClassVar[float] = 1e-3
    chooses: ClassVar[bool] = True
    rank: int = 8
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    warmup: float = 0.1
    cooldown: float = 0.1

    def start(self, model: nn.Module, how: How) -> Tuning:
        fixed = how.pattern is None or how.pattern.sparsity is not None
        sparsity = None if fixed else how.sparsity
        chosen = {"steps": how.steps, "pattern": repr(how.pattern), "sparsity": sparsity, "r": self.rank}
        weights = {"beta": self.beta, "alpha1": self.alpha1, "alpha2": self.alpha2}
        return adapted(model, "PSTConfig", how, **chosen, **weights, warmup=self.warmup, cooldown=self.cooldown)
