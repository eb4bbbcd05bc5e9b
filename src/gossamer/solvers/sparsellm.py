"""SparseLLM: the layers of an MLP pruned together, by what should stand between them."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.mlp import MLP, Activation
from gossamer.core.pattern import NM, Pattern, Unstructured
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats
from gossamer.kernels.sweep import sweep

NEWTON = 2  # steps for an entry of z that no formula gives


@spec
class SparseLLM(Solver):
    """Minimise α‖z − Ŵ₁X − b₁‖² + β‖Y − Ŵ₂p − b₂‖² + γ‖p − φ(z)‖² in each MLP (Bai et al., 2024, arXiv:2402.17946).

    Y is what the dense MLP puts out; z and p are free, for each token, and start as they are in it. From the weights that
    SparseGPT gives, each step takes in turn

        p ← (β Ŵ₂ᵀ Ŵ₂ + γI)⁻¹ (β Ŵ₂ᵀ (Y − b₂) + γ φ(z)),
        z ← its minimum, entry by entry; gated, where γ's term is ‖p − φ(s)·z‖² and s has one of α's, z and then s,
        Ŵ₁ ← SparseGPT of the refit (z − b₁) X⁺, and Ŵ₂ ← SparseGPT of (Y − b₂) p⁺, its Hessian p pᵀ.

    For ReLU the minimum over z is the lower of those of its two branches. For any other φ steps of Gauss-Newton are taken,
    each entry's only where it falls. All but the pruning lowers the sum, which therefore need not fall from step to step: the
    weights returned are those of the step that leaves least of ‖Y − MLP(X)‖², the start included (``mlp_error`` in the report
    is that over ‖Y‖², ``mlp_error_start`` SparseGPT's, ``steps`` the step it came from).

    Weights outside the MLP, attention, are SparseGPT's.

    Where this differs from the paper: X comes from attention that is pruned already; p⁺ and X⁺ are damped, towards the dense
    weights; φ other than ReLU takes those steps where the authors take gradient steps of a fixed rate (and where they turn to
    gradient steps for W₂ at 80 % and more, the refit stays); and the best step is kept, not the last.

    Args:
        steps: how many; 0 is SparseGPT.
        alpha, beta, gamma: α, β and γ; only their ratios matter.
        damp, block: SparseGPT's; the refits take the same damp.

    Beside the model stand, of the one block in work: x, y and z (and s) of all calibration tokens, the last three in float32,
    and four matrices of the sizes of the weights and of their inputs' Hessians.

    W has shape (out, in); sums are in float32, the result is cast back to W's dtype.

    >>> stats = Stats(2, gram=True)
    >>> stats.add(torch.ones(8, 2))  # two inputs that are always equal: the weight that stays takes over the other's work
    >>> SparseLLM(damp=1e-4)(torch.tensor([[1.0, 2.0]]), stats, Unstructured(), 0.5)[0].round(decimals=2)
    tensor([[0., 3.]])
    """

    steps: int = 4
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    damp: float = 0.01
    block: int = 128
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM)

    def __post_init__(self) -> None:
        weights = self.alpha, self.beta, self.gamma
        if type(self.steps) is not int or self.steps < 0 or not all(0 < one < math.inf for one in weights):
            raise GossamerError(
                "SparseLLM wants steps >= 0, and alpha, beta and gamma > 0; "
                f"got steps={self.steps!r}, alpha={self.alpha!r}, beta={self.beta!r}, gamma={self.gamma!r}"
            )
        if not 0 < self.damp < math.inf or type(self.block) is not int or self.block < 1:
            raise GossamerError(f"SparseLLM wants damp > 0 and block >= 1; got damp={self.damp!r}, block={self.block!r}")

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        return sweep(w, stats, pattern, sparsity, self.damp, self.block)

    @torch.no_grad()
    def mlp(self, mlp: MLP) -> tuple[Tensor, Tensor]:
        """Return the two pruned weights."""
        made = [mlp.made(mlp.first, x) for x in mlp.x]  # z, or s and z
        wanted = [mlp.out(mlp.second, mlp.inner(z)) for z in made]  # Y
        first = mlp.prune_first(mlp.first, mlp.stats)
        stats = Stats(mlp.second.shape[1], gram=True, device=first.device)
        for x in mlp.x:
            stats.add(mlp.inner(mlp.made(first, x)))
        second = mlp.prune_second(mlp.second, stats)
        errors: list[float] = []  # ‖Y − MLP(X)‖² of each step's weights
        best = first, second
        for step in range(self.steps + 1):
            stats = Stats(mlp.second.shape[1], gram=True, device=first.device)
            into, out = torch.zeros_like(first), torch.zeros_like(second)  # (z − b₁) Xᵀ and (Y − b₂) pᵀ
            error = 0.0
            for lane, (x, y) in enumerate(zip(mlp.x, wanted, strict=True)):
                found = mlp.made(first, x)
                error += _size(y - mlp.out(second, mlp.inner(found)))
                if step == self.steps:
                    continue
                y = y - mlp.second_bias
                p = inner(second, y, mlp.inner(made[lane]), self.beta, self.gamma)
                made[lane] = self._outer(mlp, made[lane], found, p)
                stats.add(p)
                into.addmm_((made[lane] - mlp.first_bias).T, x.float())
                out.addmm_(y.T, p)
            if error < min(errors, default=math.inf):
                best = first, second
            errors.append(error)
            if step < self.steps:
                first = mlp.prune_first(refit(mlp.first, into, mlp.stats, self.damp), mlp.stats)
                second = mlp.prune_second(refit(mlp.second, out, stats, self.damp), stats)
        size = max(sum(map(_size, wanted)), math.ulp(0.0))
        least = min(errors)
        mlp.notes.update(mlp_error=least / size, mlp_error_start=errors[0] / size, steps=errors.index(least))
        return best

    def _outer(self, mlp: MLP, now: Tensor, made: Tensor, p: Tensor) -> Tensor:
        """Return z, or s and z, given p and what the pruned first layer makes."""
        if not mlp.gated:
            return outer(mlp.act, now, made, p, 1.0, self.alpha, self.gamma)
        (s, _), (s_made, z_made) = now.chunk(2, dim=-1), made.chunk(2, dim=-1)
        gate = mlp.act(s)
        z = (self.alpha * z_made + self.gamma * gate * p) / (self.alpha + self.gamma * gate.square())
        return torch.cat([outer(mlp.act, s, s_made, p, z, self.alpha, self.gamma), z], dim=-1)


def inner(w: Tensor, y: Tensor, p: Tensor, beta: float, gamma: float) -> Tensor:
    """Minimise β‖Y − W p'‖² + γ‖p' − p‖² over p', exactly; tokens are rows.

    (β WᵀW + γI)⁻¹ (β WᵀY + γp) = p + Wᵀ (W Wᵀ + γ/β·I)⁻¹ (Y − W p), whose matrix has the size of W's outputs, which are fewer.
    """
    system = w @ w.T
    system.diagonal().add_(gamma / beta)
    return p + torch.cholesky_solve((y - p @ w.T).T, torch.linalg.cholesky(system)).T @ w


def outer(act: Activation, now: Tensor, made: Tensor, p: Tensor, times: Tensor | float, alpha: float, gamma: float) -> Tensor:
    """Minimise α(z − m)² + γ(p − u φ(z))² over each entry of z; for a φ that is not ReLU, lower it from where it is.

    Args:
        act: φ.
        now: z as it is.
        made: m.
        p: what u φ(z) should be.
        times: u, a number or a tensor of the entries' shape.
    """

    def cost(z: Tensor) -> Tensor:
        return alpha * (z - made).square() + gamma * (p - times * act(z)).square()

    def lower(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(cost(one) <= cost(other), one, other)

    if isinstance(act, nn.ReLU):
        above = (alpha * made + gamma * times * p) / (alpha + gamma * times * times)
        return lower(above.clamp_min(0), made.clamp_max(0))
    z = lower(now, made)
    for _ in range(NEWTON):
        value, slope = _with_slope(act, z)
        slope = slope * times
        step = (alpha * (z - made) - gamma * slope * (p - times * value)) / (alpha + gamma * slope.square())
        z = lower(lower(z - step, z - step / 4), z)  # where φ bends, the whole step goes too far
    return z


def refit(w: Tensor, product: Tensor, stats: Stats, damp: float) -> Tensor:
    """Minimise ‖T − W' X‖² + λ‖W' − W‖² over W', given T Xᵀ and the statistics of X; λ is their damping."""
    upper, _, _ = stats.inverse_factor(damp)
    return w + (product - w @ stats.symmetric_gram()) @ upper.T @ upper


def _size(x: Tensor) -> float:
    """Return ‖x‖²."""
    return float(x.square().sum(dtype=torch.float64))


def _with_slope(act: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return φ(z) and φ'(z)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = act(z)
        (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope
