"""Asymmetric: any method, aimed at what the dense model puts out and not at what the pruned model's inputs would give."""

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern
from gossamer.core.score import Score
from gossamer.core.solver import Around, Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class Asymmetric(Around):
    """Minimise ‖W X̃ − Ŵ X‖², X̃ the dense model's input and X the pruned one's (Li et al., 2025, GPTAQ, arXiv:2504.02692).

    Whatever Ŵ is, ‖W X̃ − Ŵ X‖² + λ‖W − Ŵ‖² = tr (W* − Ŵ) H (W* − Ŵ)ᵀ + a constant, with H = X Xᵀ + λ·mean(diag)·I and

        W* = W + (W (X̃ − X) Xᵀ) H⁻¹:

    so the method itself is what it was, and is given W* for W. The paper quantises and takes the step inside GPTQ's sweep;
    here it comes once before any method, and so prunes.

    Args:
        method: what chooses the mask, and moves the kept weights if it is a solver: ``Asymmetric(ALPS())``.
        share: how much of the step towards W* is taken, 0 none. Few windows determine X̃ − X less well than X.
        damp: λ, as a fraction of H's mean diagonal.

    The dense model goes through the same windows beside the pruned one, block by block: a second forward pass, a copy of one
    block, and one more (in, in) matrix an input. Routed experts see other tokens in the two models: there W* = W.
    W has shape (out, in); sums are in float32, the result is cast back to W's dtype.

    >>> from gossamer.core.pattern import Unstructured
    >>> from gossamer.scores import Wanda
    >>> stats, x = Stats(2, gram=True), torch.eye(2)
    >>> stats.add(x, dense=2 * x)  # the inputs have come down to half of what they were
    >>> Asymmetric(Wanda(), damp=1e-6)(torch.tensor([[1.0, 2.0]]), stats, Unstructured(), 0.5)[0].round(decimals=3)
    tensor([[0., 4.]])
    """

    method: Score | Solver
    share: float = 1.0
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if "dense" in self.method.needs:
            raise GossamerError(f"{self.method!r} looks at both models' inputs itself: take it alone")
        if not (0 <= self.share <= 1 and self.damp > 0):
            raise GossamerError(f"Asymmetric wants share in [0, 1] and damp > 0; got share={self.share!r}, damp={self.damp!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """gram, cross, and what its method needs"""
        return frozenset({"gram", "cross"}) | self.method.needs

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        aim = w.float()
        if stats.cross is not None:
            upper, _, _ = stats.inverse_factor(self.damp)
            aim = aim + self.share * (aim @ stats.cross) @ upper.T @ upper
        found, mask = self.inside(aim, stats, pattern, sparsity)
        return found.to(w.dtype), mask
