"""AST: the kept weights of an N:M mask that follows their magnitudes are used, and all of them are trained."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Pattern, Unstructured
from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._steered import Layer, Steered
from gossamer.tuners._weights import Weight


@spec
class AST(Tuner):
    """Adaptive sparse trainer: y = (W ⊙ M)x, ∂L/∂W = ∂L/∂(W ⊙ M), and W ⊙ ¬M decays.

    M are the largest magnitudes of each group, taken anew every ``every`` steps. What it leaves out is trained too, straight
    through, and decays as λ(t) = min(t / T₀, 1) · ``decay`` with T₀ = ``ramp`` · steps:

        ũ = m + λ(t) W ⊙ ¬M,   v ← β₂v + (1 − β₂)ũ²,   W ← W − η ũ̂ / (√v̂ + ε)

    so the decay is scaled as a gradient is, and is not accumulated in m. v of ũ is less than v of g: where g is noise, updates
    are √((1 + β₁) / (1 − β₁)) = 4.4 times those of plain Adam. The first step is Adam's own; the rate wants a warm-up.

    Args:
        decay: λ at its largest.
        ramp: T₀ as a fraction of the steps.
        every: steps from one mask to the next.

    Raises:
        GossamerError: hyper-parameters that cannot be; a pattern that does not fit; an optimizer that is not torch's AdamW.

    Source: Huang et al., 2024, arXiv:2407.20584; where the decay stands in the step, from the code of its authors.

    >>> AST(decay=2e-4)
    AST(decay=0.0002)
    """

    decay: float = 1e-4
    ramp: float = 0.25
    every: int = 10
    rate: ClassVar[float] = 1e-4
    chooses: ClassVar[bool] = True
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM, Unstructured, Block)

    def __post_init__(self) -> None:
        if self.decay < 0 or not 0 <= self.ramp <= 1 or self.every < 1:
            raise GossamerError(
                f"AST wants decay ≥ 0, ramp in [0, 1] and every ≥ 1; got {self.decay}, {self.ramp}, {self.every}"
            )

    def start(self, model: nn.Module, how: How) -> Tuning:
        return Steered(model, how, self)

    def layer(self, weight: Weight, mask: Tensor) -> Layer:
        return _Masked(weight, mask)

    def moment(self, m: Tensor, v: Tensor, w: Tensor, mask: Tensor, step: int, steps: int) -> Tensor:
        ramped = min(step / (self.ramp * steps), 1.0) if self.ramp else 1.0
        return torch.where(mask, m, m.add(w, alpha=self.decay * ramped))


class _Masked(Layer):
    def forward(self, w: Tensor) -> Tensor:
        return torch.where(self.mask, w, w - w.detach())  # zero, and its gradient goes straight through

    def folded(self, w: Tensor) -> Tensor:
        return w * self.mask
