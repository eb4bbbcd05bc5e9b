"""Fisher: ½ w²·F, the second-order change of the loss, each weight on its own."""

from typing import ClassVar

from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Fisher(Score):
    """S = ½ w²·1/N Σ_n (∂L_n/∂w)², L_n a window's next-token loss (Theis et al., 2018, arXiv:1801.05787).

    Optimal Brain Damage (LeCun et al., 1990) with the diagonal of the empirical Fisher matrix for the Hessian's. `OBERT` takes
    weights a group at a time, and moves those that stay. The squares are those of the model before anything is pruned,
    and all of them are in memory at once.

    >>> import torch
    >>> stats = Stats(2)
    >>> stats.square_grad = torch.tensor([[5.0, 2.0]])  # of two windows, whose gradients are [1, 0] and [3, 2]
    >>> Fisher()(torch.tensor([[2.0, 1.0]]), stats)
    tensor([[10.,  1.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"square_grad"})

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        assert stats.square_grad is not None
        return x.float().square() * stats.square_grad / 2
