"""CAST: weights outside an N:M mask shrink to zero while the whole model is trained, without a mask in its forward pass."""

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
class CAST(Tuner):
    """Continuous adaptive sparse trainer: AdamS and weight scaling; y = (A ⊙ W)x.

    Outside the mask M, the largest magnitudes of each group taken anew every ``every`` steps, Adam's moment gives way to an L1
    decay, at step t of T by α = t / T (AdamS):

        ũ = m  where M,  (1 − α)m + α λ sign(W)  elsewhere;   v ← β₂v + (1 − β₂)ũ²,   W ← W − η ũ̂ / (√v̂ + ε)

    A has ``scales`` trained factors a row, each for as many columns in a row, ones at first. Both end in one plain weight,
    A ⊙ W ⊙ M. A weight outside moves to zero by about η a step at most, whatever λ is: it gets there only if Σ η α is more
    than its magnitude, and what it has not lost by then is lost at once in the end: start from a pruned model, or train long.

    Args:
        decay: λ; None takes the square root of the mean v̂ of the entries in the mask, for each weight and step, as the paper
            wants λ of the order of the gradient and gives a number for each of its models (4e-7 for 7 billion parameters).
        scales: factors a row.
        every: steps from one mask to the next.

    Raises:
        GossamerError: hyper-parameters that cannot be; a pattern or ``scales`` that do not fit; an optimizer that is not
            torch's AdamW.

    Source: Huang et al., 2025, arXiv:2509.25996, which has no public code: its equations as others report them. Which columns
    share a factor, and what stands for λ by default, could not be verified.

    >>> CAST(scales=4)
    CAST(scales=4)
    """

    decay: float | None = None
    scales: int = 2
    every: int = 10
    rate: ClassVar[float] = 3e-4
    chooses: ClassVar[bool] = True
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM, Unstructured, Block)

    def __post_init__(self) -> None:
        if (self.decay is not None and self.decay < 0) or self.scales < 1 or self.every < 1:
            raise GossamerError(f"CAST wants decay ≥ 0, scales ≥ 1, every ≥ 1; got {self.decay}, {self.scales}, {self.every}")

    def start(self, model: nn.Module, how: How) -> Tuning:
        return Steered(model, how, self, soft=True)

    def layer(self, weight: Weight, mask: Tensor) -> Layer:
        return _Scaled(weight, mask, self.scales)

    def moment(self, m: Tensor, v: Tensor, w: Tensor, mask: Tensor, step: int, steps: int) -> Tensor:
        alpha = min(step / steps, 1.0)
        decay = ((v * mask).sum() / mask.sum()).sqrt() if self.decay is None else self.decay
        return torch.where(mask, m, (1 - alpha) * m + alpha * decay * w.sign())


class _Scaled(Layer):
    def __init__(self, weight: Weight, mask: Tensor, scales: int) -> None:
        super().__init__(weight, mask)
        self._weight = weight
        matrices = weight.matrices(weight.parameter.detach())
        if (columns := matrices.shape[-1]) % scales:
            raise GossamerError(f"{weight.name}: {scales} scales a row do not divide its {columns} columns")
        self.scale = nn.Parameter(matrices.new_ones(*matrices.shape[:-1], scales))  # (experts or 1, out, scales)

    def forward(self, w: Tensor) -> Tensor:
        groups = torch.unflatten(self._weight.matrices(w), -1, (self.scale.shape[-1], -1))
        return self._weight.stored((groups * self.scale.unsqueeze(-1)).flatten(-2))

    def folded(self, w: Tensor) -> Tensor:
        scaled: Tensor = self(w)
        return scaled * self.mask
