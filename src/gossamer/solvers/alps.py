"""ALPS: the alternating direction method of multipliers on one layer, then the best weights for the support it found."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Channel, Pattern, Unstructured
from gossamer.core.refit import best_refit
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats

# How much the penalty grows, by the share of the kept entries that changed since the last time; it grows every `PERIOD` steps.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
PERIOD = 3


@spec
class ALPS(Solver):
    """Minimise ‖W X − Ŵ X‖² + λ‖W − Ŵ‖² under the pattern by ADMM (Meng et al., 2024, arXiv:2406.07831).

    On the Hessian with its diagonal scaled to one, with copy D of the weights that follows the pattern and dual V,

        W ← (H + ρI)⁻¹ (H W₀ − V + ρD),   D ← P(W + V/ρ),   V ← V + ρ(W − D),

    P keeping what is largest. ρ grows while the support still changes, and the steps end when it does not; the kept weights
    are then the exact minimiser on that support. H = X Xᵀ + λ·mean(diag)·I is decomposed once for all weights that share
    their input. What is returned is never worse than the refit of the first support, D₀ = P(W₀), which is Wanda's mask.

    Where this differs from the paper: the refit is solved exactly, by Cholesky, where the paper takes conjugate-gradient steps;
    and a step's residuals are measured in W − W₀, which is the same iteration.

    Args:
        damp: λ, as a fraction of H's mean diagonal.
        rho: the first ρ.
        steps: at most how many; the number taken is in the report (``steps``).

    W has shape (out, in); sums are in float32, the result is cast back to W's dtype.

    >>> stats = Stats(2, gram=True)
    >>> stats.add(torch.ones(8, 2))  # two inputs that are always equal: the weight that stays takes over the other's work
    >>> ALPS(damp=1e-4)(torch.tensor([[1.0, 2.0]]), stats, Unstructured(), 0.5)[0].round(decimals=2)
    tensor([[0., 3.]])
    """

    damp: float = 0.01
    rho: float = 0.1
    steps: int = 300
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM, Block, Channel)

    def __post_init__(self) -> None:
        if not (self.damp > 0 and self.rho > 0) or self.steps < 0:
            raise GossamerError(
                f"ALPS wants damp > 0, rho > 0 and steps >= 0; got damp={self.damp!r}, rho={self.rho!r}, steps={self.steps!r}"
            )

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        scale, values, vectors = stats.spectrum(self.damp)
        dense = w.float() * scale
        first = mask = pattern.select(dense.square(), sparsity)
        d, v, rho = dense * mask, torch.zeros_like(dense), self.rho
        before, step = mask, 0
        for step in range(1, self.steps + 1):
            move = ((rho * (d - dense) - v) @ vectors).div_(values + rho) @ vectors.T
            now = dense + move
            aim = now + v / rho
            mask = pattern.select(aim.square(), sparsity)
            d = aim * mask
            v += rho * (now - d)
            if step % PERIOD == 0:
                changed = int((mask ^ before).sum())
                if not changed:
                    break
                rho *= next(growth for share, growth in GROWTH if changed >= share * int(mask.sum()))
                before = mask
        stats.notes["steps"] = step
        found, mask = best_refit(w.float(), (first, mask), stats.hessian(self.damp))
        return found.to(w.dtype), mask
