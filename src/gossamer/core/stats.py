"""Stats: what calibration learnt about the inputs of a weight (or of several that share them)."""

from typing import Any

import torch
from torch import Tensor

# The Gram product is symmetric: compute column panels of the lower triangle only, wide enough for the matrix unit.
PANELS = 4

# What is gathered from a weight's inputs, block by block; the rest of what a method may need comes from a backward pass.
INPUTS = frozenset({"norm", "mean", "gram", "cross", "dense"})
PAIRED = frozenset({"cross", "dense"})  # of these, what wants the dense model's inputs beside the pruned one's


class Stats:
    """Statistics of the rows x of a weight's input, accumulated batch by batch in float32.

    Attributes:
        tokens: how many input rows were seen.
        square_sum: Σ x², shape (in,).
        total: Σ x, shape (in,), where the mean was asked for; None otherwise.
        gram: Σ x xᵀ, shape (in, in), where it was asked for; None otherwise.
        cross: Σ (x̃ − x) xᵀ, shape (in, in), x̃ the same rows in the dense model, where it was asked for; None otherwise, and
            where the two models' rows are not the same tokens (routed experts).
        dense: the statistics of those rows in the dense model, where they were asked for; None otherwise.
        grad: gradient of the loss with respect to the weight, its shape, where it was asked for; None otherwise.
        square_grad: the mean over the windows of its square, each window's own loss taken; None otherwise.
        hessian_grad: the Hessian of that loss times its gradient, where it was asked for; None otherwise.
        synflow: gradient of SynFlow's objective with respect to |weight|, where it was asked for; None otherwise.
        white: no input was seen, and the statistics are those of white inputs.
        damping: the damping the last factorisation needed; None before there was one.
        dead: how many inputs that factorisation found to be always zero.
        grads: the same of each calibration window on its own, (windows, out, in), where asked for; None otherwise.
        notes: what a solver has to say of the last weight it solved, for the weight's row in the report.
    """

    def __init__(self, width: int, *, gram: bool = False, mean: bool = False, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.square_sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.total = torch.zeros(width, dtype=torch.float32, device=device) if mean else None
        self.gram = torch.zeros(width, width, dtype=torch.float32, device=device) if gram else None
        self.cross: Tensor | None = None
        self.dense: Stats | None = None
        self.grad: Tensor | None = None
        self.grads: Tensor | None = None
        self.square_grad: Tensor | None = None
        self.hessian_grad: Tensor | None = None
        self.synflow: Tensor | None = None
        self.white = False
        self.damping: float | None = None
        self.dead = 0
        self.notes: dict[str, Any] = {}
        self._factors: dict[float, tuple[Tensor, Tensor, float]] = {}
        self._spectra: dict[float, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def unseen(cls, width: int, *, device: torch.device | str = "cpu") -> "Stats":
        """Return the statistics of white inputs (mean 0, variance 1), under which every method ranks by magnitude.

        For a weight that no calibration token reached: an expert nothing was routed to.
        """
        stats = cls(width, gram=False, device=device)
        stats.white = True
        stats.square_sum.fill_(1.0)
        stats.total = torch.zeros_like(stats.square_sum)
        stats.gram = torch.eye(width, dtype=torch.float32, device=device)
        return stats

    @torch.no_grad()
    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add input rows x of shape (..., in), any float dtype, and to `cross` where the dense model's rows are given."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if dense is not None:
            drift = dense.detach().reshape(x.shape).float() - x
            self.cross = drift.T @ x if self.cross is None else self.cross.addmm_(drift.T, x)
        self._factors.clear()
        self._spectra.clear()
        self.tokens += x.shape[0]
        if self.total is not None:
            self.total += x.sum(0)
        if self.gram is None:
            self.square_sum += torch.linalg.vector_norm(x, dim=0).square_()
            return
        width = x.shape[1]
        step = -(-width // PANELS)
        for start in range(0, width, step):  # rows start: of the lower triangle's column panel
            stop = min(start + step, width)
            self.gram[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.square_sum = self.gram.diagonal()

    def ordered(self, order: Tensor) -> "Stats":
        """Return the same statistics with the inputs in another order, shape (in,), as new tensors."""
        stats = Stats(0)
        stats.tokens, stats.white, stats.notes = self.tokens, self.white, self.notes
        stats.square_sum = self.square_sum[order]
        stats.total = None if self.total is None else self.total[order]
        stats.gram = None if self.gram is None else self.symmetric_gram()[order][:, order]
        stats.cross = None if self.cross is None else self.cross[order][:, order]
        stats.dense = None if self.dense is None else self.dense.ordered(order)
        return stats

    @property
    def norm(self) -> Tensor:
        """‖x_j‖₂ of each input feature over all calibration tokens, shape (in,)."""
        return self.square_sum.clamp_min(0).sqrt()

    @property
    def mean(self) -> Tensor:
        """E[x_j] of each input feature over the calibration tokens, shape (in,)."""
        assert self.total is not None, "the mean was not asked for"
        return self.total / max(self.tokens, 1)

    @property
    def variance(self) -> Tensor:
        """E[x_j²] − E[x_j]² of each input feature over the calibration tokens, shape (in,)."""
        return (self.square_sum / max(self.tokens, 1) - self.mean.square()).clamp_min(0)

    def symmetric_gram(self) -> Tensor:
        """Return Σ x xᵀ in full, shape (in, in), as a new tensor."""
        assert self.gram is not None, "the Gram matrix was not asked for"
        lower = self.gram.tril()
        return lower + lower.tril(-1).T

    def inverse_factor(self, damp: float) -> tuple[Tensor, Tensor, float]:
        """Factor the inverse Hessian of the layer's squared error: H⁻¹ = Uᵀ U, H = X Xᵀ + λ·mean(diag)·I.

        Inputs that are always zero get a unit diagonal, count nothing towards the mean, and are reported as dead. Where H is
        not positive definite to float32, the damping is multiplied by 10 until it is; the damping used is returned, and callers
        report it.

        Args:
            damp: λ, a fraction of the mean diagonal.

        Returns:
            U, upper triangular, shape (in, in); the mask of dead inputs, shape (in,); the damping used.

        Raises:
            ArithmeticError: the statistics hold NaN or infinities, so that no damping helps.
        """
        if damp not in self._factors:
            assert self.gram is not None, "the Gram matrix was not asked for"
            diagonal, dead, mean = self._diagonal()
            used = damp
            while True:
                # Wide layers make these matrices large, so each is dropped as soon as the next is there. Only H's lower
                # triangle is read, which is the one the Gram matrix has.
                h = self.gram.clone()
                h.diagonal().copy_(torch.where(dead, 1.0, diagonal) + used * mean)
                lower, failed = torch.linalg.cholesky_ex(h)
                del h
                if not failed:
                    inverse = torch.cholesky_inverse(lower)
                    del lower
                    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                    del inverse
                if not failed and bool(upper.isfinite().all()):
                    break
                used = max(used * 10, 1e-6)
            self._factors[damp] = (upper, dead, used)
            self.damping, self.dead = used, int(dead.sum())
        return self._factors[damp]

    def hessian(self, damp: float) -> Tensor:
        """Return H = X Xᵀ + λ·mean(diag)·I in full, shape (in, in), as a new tensor; the mean is over inputs not always zero.

        Raises:
            ArithmeticError: the statistics hold NaN or infinities.
        """
        _, dead, mean = self._diagonal()
        h = self.symmetric_gram()
        h.diagonal().add_(damp * mean)
        self.damping, self.dead = damp, int(dead.sum())
        return h

    def spectrum(self, damp: float) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose H with its diagonal scaled to one: S H S = Q Λ Qᵀ, S = diag(H)^−½, H = `hessian(damp)`.

        Made once for all weights that share the input; where the Gram matrix has no full rank, eigenvalues are zero at worst.

        Returns:
            The scale diag(H)^½, shape (in,); Λ ≥ 0, shape (in,); Q, shape (in, in), an eigenvector a column.
        """
        if damp not in self._spectra:
            h = self.hessian(damp)
            scale = h.diagonal().sqrt()
            values, vectors = torch.linalg.eigh(h.div_(scale).div_(scale[:, None]))
            self._spectra[damp] = (scale, values.clamp_min_(0), vectors)
        return self._spectra[damp]

    def _diagonal(self) -> tuple[Tensor, Tensor, float]:
        """Return the Gram matrix's diagonal, where it is zero, and its mean where it is not; raise unless it is finite."""
        assert self.gram is not None, "the Gram matrix was not asked for"
        diagonal = self.gram.diagonal()
        if not bool(diagonal.isfinite().all()):  # x_i x_j is infinite or NaN only where x_i² or x_j² is
            raise ArithmeticError("the calibration inputs hold NaN or infinities")
        dead = diagonal == 0
        return diagonal, dead, float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
