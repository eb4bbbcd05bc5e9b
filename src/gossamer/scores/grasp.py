"""GraSP: keep the weights whose removal would lower the gradient flow."""

from typing import ClassVar

from torch import Tensor

from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class GraSP(Score):
    """S = w · (H g), g = ∂L/∂w and H = ∂²L/∂w²: what removing w would take from ‖g‖² (Wang et al., 2020, arXiv:2002.07376).

    To first order removing w changes gᵀg by −2·w·(H g). The paper prunes the largest −w·(H g); the sign here is the opposite,
    higher = keep. A score may be negative: removing that weight raises the flow. H and g are of the mean next-token loss over
    the calibration windows and over all weights to be pruned, without the paper's temperature of 200 on the logits. With
    allocate="global_" the method is the paper's, for a model at initialisation; ‖g‖² means little near a minimum.

    Needs two passes through the whole model, the second backward twice.

    >>> import torch
    >>> stats = Stats(2)
    >>> stats.hessian_grad = torch.tensor([[0.5, -3.0]])
    >>> GraSP()(torch.tensor([[2.0, 1.0]]), stats)
    tensor([[ 1., -3.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian_grad"})

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        assert stats.hessian_grad is not None
        return x.float() * stats.hessian_grad
