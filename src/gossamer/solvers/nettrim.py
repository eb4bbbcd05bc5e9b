"""Net-Trim: the weights of least ℓ1 norm that keep the layer's response, by convex programming."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Channel, Pattern, Unstructured
from gossamer.core.refit import best_refit, error, refit
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class NetTrim(Solver):
    """Minimise ‖U‖₁ subject to ‖U X − W X‖_F ≤ ε, then fit the pattern (Aghasi et al., 2017, arXiv:1611.05162).

    The linear form of the programme, solved by ADMM as in Fast Net-Trim (arXiv:1806.06457) on the eigenvectors of the Hessian
    H = X Xᵀ + λ·mean(diag)·I: U ← the point of the ellipsoid nearest to Z − Y, Z ← soft(U + Y, τ), Y ← Y + U − Z.

    Where this differs from the papers: the linears of a transformer are followed by no ReLU of their own, so the response is
    kept everywhere and not only where it is positive; inputs are taken at unit norm, so that the ℓ1 norm weighs a weight by its
    input; and ℓ1 fixes no count, so the pattern selects the largest |U| and the weights kept are refitted exactly. The result
    is never worse than the refit of the largest |W|. A weight sees the inputs that the pruned layers before it put out, and
    answers as W would; ``Parallel(NetTrim())`` is the paper's parallel form, ``Asymmetric(NetTrim())`` its cascade.

    Args:
        eps: ε / ‖W X‖_F; if None, ε is the error of the largest |W| refitted: less ℓ1 norm at no more error than that.
        damp: λ, as a fraction of H's mean diagonal.
        steps: how many steps of ADMM.

    W has shape (out, in); sums are in float32, the result is cast back to W's dtype.

    >>> stats = Stats(2, gram=True)
    >>> stats.add(torch.ones(8, 2))  # two inputs that are always equal: the weight that stays takes over the other's work
    >>> NetTrim(damp=1e-4)(torch.tensor([[1.0, 2.0]]), stats, Unstructured(), 0.5)[0].round(decimals=2)
    tensor([[0., 3.]])
    """

    eps: float | None = None
    damp: float = 0.01
    steps: int = 50
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM, Block, Channel)

    def __post_init__(self) -> None:
        if (self.eps is not None and not 0 <= self.eps < 1) or not self.damp > 0 or self.steps < 0:
            raise GossamerError(
                "NetTrim wants eps in [0, 1) or None, damp > 0 and steps >= 0; "
                f"got eps={self.eps!r}, damp={self.damp!r}, steps={self.steps!r}"
            )

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        scale, _, _ = spectrum = stats.spectrum(self.damp)
        h, exact = stats.hessian(self.damp), w.float()
        first = pattern.select((exact * scale).square(), sparsity)
        nearest = refit(exact, first, h) if self.eps is None else torch.zeros_like(exact)
        budget = (1.0 if self.eps is None else self.eps**2) * float(error(exact, nearest, h).sum())
        u = least_l1(exact * scale, spectrum[1:], budget, self.steps)
        found, mask = best_refit(exact, (first, pattern.select(u.square(), sparsity)), h)
        return found.to(w.dtype), mask


def least_l1(w: Tensor, spectrum: tuple[Tensor, Tensor], budget: float, steps: int) -> Tensor:
    """Minimise ‖U‖₁ subject to tr (U − W) H (U − W)ᵀ ≤ budget, H = Q Λ Qᵀ given by (Λ, Q)."""
    values, vectors = spectrum
    tau = w.abs().mean()
    z, y = w, torch.zeros_like(w)
    for _ in range(steps):
        p = (z - y - w) @ vectors
        shrink = _onto_ellipsoid(p.square().sum(0), values, budget)
        u = w + (p * shrink) @ vectors.T
        z = (u + y).sign() * ((u + y).abs() - tau).clamp_min(0)
        y = y + u - z
    return z


def _onto_ellipsoid(size: Tensor, values: Tensor, budget: float) -> Tensor:
    """Return 1 / (1 + μλ_j) with the least μ ≥ 0 for which Σ λ_j size_j / (1 + μλ_j)² ≤ budget, by sections of log μ.

    The sum falls as μ grows: of 64 points at a time those above the budget are counted, which no device has to be waited for.
    """

    def over(log: Tensor) -> Tensor:
        return (values * size / (1 + log.exp()[:, None] * values).square()).sum(1) > budget

    low, width = values.new_full((1,), -30.0), 60.0
    places = torch.arange(1, 65, device=values.device)
    outside = over(low)
    for _ in range(5):
        width /= len(places)
        low = low + width * over(low + width * places).sum()
    return torch.where(outside, 1 / (1 + (low + width).exp() * values), 1.0)
