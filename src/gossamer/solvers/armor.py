"""ARMOR: a sparse core between two block-diagonal matrices, fitted by block coordinate descent."""

import itertools
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern
from gossamer.core.solver import Factorizer, Factors
from gossamer.core.spec import spec
from gossamer.core.stats import Stats

# What is added to the diagonal of a system, against its mean: a damped step still goes downhill.
DAMP = 1e-6


@spec
class ARMOR(Factorizer):
    """Minimise Σ_ij (W̄ − A (S ⊙ M) B)_ij²·‖X_j‖² (Liu et al., 2025, arXiv:2510.05528), A and B block-diagonal, M of N:M.

    W̄ is W with its columns, then its rows, at unit norm (see `NoWagP`); the norms go back into B and A. From A = B = I and
    NoWag-P's mask, each step takes in turn

        A ← the least-squares optimum, then B, each given all else;
        S ← ``inner`` steps of conjugate gradients on the kept entries;
        M ← for groups of m, the mask and values that lower the loss most, every mask tried, all else as it is.

    The loss is a sum over pairs (a block of A, a block of B), each with its own block of the core. There the best group of
    every row changes at once if that lowers the pair's loss, the best of all alone if only that does, and none otherwise. So
    no step raises the loss, which ends at most at NoWag-P's: ``proxy_loss`` in the report is their ratio.

    Where this differs from the paper: A, B and S take exact or conjugate-gradient steps, and few, where the authors take some
    thousands of Adam's; groups are the best ones, where the authors draw one by its gradient; and the norms of dead inputs are
    raised to 1e-4 of the mean, so that they are fitted at all.

    Args:
        block: rows and columns of a block of A and of B; it divides both sizes of the weight, and m divides it.
        steps: how many times all are taken in turn.
        inner: steps of conjugate gradients in each.

    W has shape (out, in). Its product A·S·B has no zeros; those of the report are the core's.

    >>> stats = Stats(4)
    >>> stats.add(torch.eye(4))
    >>> a, s, b = ARMOR(block=4)(torch.ones(4, 4), stats, NM(2, 4), None)
    >>> (a[0] @ s @ b[0]).round(decimals=2)[0], s.count_nonzero(1)  # of rank one, which the core alone could not be
    (tensor([1., 1., 1., 1.]), tensor([2, 2, 2, 2]))
    """

    block: int = 64
    steps: int = 20
    inner: int = 4
    needs: ClassVar[frozenset[str]] = frozenset({"norm"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM,)

    def __post_init__(self) -> None:
        if self.block < 1 or self.steps < 0 or self.inner < 0:
            raise GossamerError(
                "ARMOR wants block >= 1, steps >= 0 and inner >= 0; "
                f"got block={self.block!r}, steps={self.steps!r}, inner={self.inner!r}"
            )

    def check(self, shape: tuple[int, int], pattern: Pattern, name: str = "the weight") -> None:
        assert isinstance(pattern, NM)
        if self.block % pattern.m:
            raise GossamerError(f"ARMOR(block={self.block}) wants a block that the groups of {pattern} divide")
        if shape[0] % self.block or shape[1] % self.block:
            raise GossamerError(
                f"ARMOR(block={self.block}) wants sizes that its block divides; {name} is {shape[0]}x{shape[1]}"
            )

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> Factors:
        assert isinstance(pattern, NM)
        self.check((w.shape[0], w.shape[1]), pattern)
        least = torch.finfo(torch.float32).tiny
        exact = w.float()
        columns = torch.linalg.vector_norm(exact, dim=0).clamp_min(least)
        rows = torch.linalg.vector_norm(exact / columns, dim=1).clamp_min(least)
        unit = exact / columns / rows[:, None]
        mask = pattern.select((unit * stats.norm).square(), sparsity)

        # In blocks, (block of A, block of B, row, column); the norms of the inputs are in the target and in B.
        d, size = self.block, stats.norm / stats.norm.mean().clamp_min(least)
        size = torch.where(stats.norm.any(), size.clamp_min(1e-4), torch.ones_like(size))
        target, core, keep = _blocks(unit * size, d), _blocks(unit * mask, d), _blocks(mask, d)
        left = torch.eye(d, device=w.device).repeat(len(target), 1, 1)
        right = torch.diag_embed(size.view(-1, d))
        rest = target - core @ right
        start = loss = rest.square().sum()
        best = left, core, right
        for _ in range(self.steps):
            left, rest = _fit_left(rest, left, core, right)
            right, rest = _fit_right(rest, left, core, right)
            core, slope = _fit_core(rest, left, core, right, keep, self.inner)
            core, keep = _swap(slope, left, core, right, keep, pattern)
            rest = target - left[:, None] @ (core @ right)
            now = rest.square().sum()
            if not now < loss:  # at the precision of float32
                break
            loss, best = now, (left, core, right)
        stats.notes["proxy_loss"] = float(loss / start) if start > 0 else 1.0
        left, core, right = best
        return Factors(
            rows.view(-1, d, 1) * left,
            core.transpose(1, 2).reshape(w.shape),
            right * (columns / size).view(-1, 1, d),
        )


def _blocks(matrix: Tensor, d: int) -> Tensor:
    """Return a matrix as (out / d, in / d, d, d)."""
    rows, columns = matrix.shape
    return matrix.view(rows // d, d, columns // d, d).transpose(1, 2).contiguous()


def _solve(h: Tensor, g: Tensor) -> Tensor:
    """Return H⁻¹ G for each pair of a batch, H positive semidefinite and a little damped."""
    mean = h.diagonal(dim1=1, dim2=2).mean(1)
    h = h + (DAMP * mean + torch.finfo(h.dtype).tiny)[:, None, None] * torch.eye(h.shape[-1], device=h.device)
    found: Tensor = torch.linalg.solve(h, g)
    return found


def _fit_left(rest: Tensor, left: Tensor, core: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Move A to its optimum, by R Yᵀ (Y Yᵀ)⁻¹ for each of its blocks, Y = S B; return it and what is left of the target, R."""
    y = core @ right
    move = _solve((y @ y.mT).sum(1), (y @ rest.mT).sum(1)).mT
    return left + move, rest - move[:, None] @ y


def _fit_right(rest: Tensor, left: Tensor, core: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Move B to its optimum, by (Zᵀ Z)⁻¹ Zᵀ R for each of its blocks, Z = A S; return it and what is left."""
    z = left[:, None] @ core
    move = _solve((z.mT @ z).sum(0), (z.mT @ rest).sum(0))
    return right + move, rest - z @ move


def _fit_core(rest: Tensor, left: Tensor, core: Tensor, right: Tensor, keep: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Move S on what is kept, by conjugate gradients on Aᵀ A Δ B Bᵀ = Aᵀ R Bᵀ, a system for each of its blocks.

    Return it and the slope there, Aᵀ R Bᵀ, of what is kept and what is not.
    """
    p, k = (left.mT @ left)[:, None], right @ right.mT
    least = torch.finfo(core.dtype).tiny
    scale = keep / (p.diagonal(dim1=2, dim2=3)[..., None] * k.diagonal(dim1=1, dim2=2)[:, None, :]).clamp_min(least)
    slope = left.mT[:, None] @ (rest @ right.mT)
    way = slope * scale
    size = _dot(slope, way)
    for _ in range(steps):
        pushed = p @ (way @ k)
        step = size / _dot(way, pushed).clamp_min(least)
        core, slope = torch.addcmul(core, step, way), torch.addcmul(slope, step, pushed, value=-1)
        better = slope * scale
        before, size = size, _dot(slope, better)
        way = torch.addcmul(better, size / before.clamp_min(least), way)
    return core, slope


def _swap(slope: Tensor, left: Tensor, core: Tensor, right: Tensor, keep: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Give groups of the core the mask and values that lower the loss most, where it falls; return S and M.

    With all else as it is, a group s of row r has the loss p_rr (s K sᵀ − 2 s uᵀ) and a constant: p = Aᵀ A, K is its part of
    B Bᵀ, and u = s₀ K + slope / p_rr. At the best values for a mask, u K' with K' = (K on the mask)⁻¹, that is − p_rr u K' uᵀ.
    """
    n, m = pattern.n, pattern.m
    p, k = left.mT @ left, right @ right.mT
    above, beside, d, _ = core.shape

    def grouped(x: Tensor) -> Tensor:
        """By group: (block of B, group in it, block of A and row in it, m)."""
        return x.view(above, beside, d, d // m, m).permute(1, 3, 0, 2, 4).flatten(2, 3)

    each = k.view(beside, d // m, m, d // m, m).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # K
    alone = p.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(p.dtype).tiny)[:, None, :, None]  # p_rr
    now = grouped(core)
    u = now @ each + grouped(slope / alone)
    masks = torch.tensor([[j in kept for j in range(m)] for kept in itertools.combinations(range(m), n)], device=core.device)
    inside, eye = masks[:, :, None] & masks[:, None, :], torch.eye(m, device=core.device)
    some = torch.where(inside, each[:, :, None], eye)
    solved = _solve(some.view(-1, m, m), eye.expand(some[..., 0, 0].numel(), m, m)).view_as(some) * inside  # K' of each mask
    gain, which = torch.stack([((u @ solved[:, :, i]) * u).sum(-1) for i in range(len(masks))]).max(0)
    gain = gain - (now * (2 * u - now @ each)).sum(-1)  # against what the group has now
    best, group = (gain.view(beside, d // m, above, d).permute(2, 0, 3, 1) * alone).max(-1)  # of each row

    a, b, row = torch.meshgrid(*(torch.arange(size, device=core.device) for size in (above, beside, d)), indexing="ij")
    chosen = which[b, group, a * d + row]
    values = (u[b, group, a * d + row][..., None, :] @ solved[b, group, chosen])[..., 0, :]
    columns = group[..., None] * m + torch.arange(m, device=core.device)
    change = values - core.gather(3, columns)
    first = torch.zeros_like(best, dtype=torch.bool).scatter_(2, best.argmax(-1, keepdim=True), True)
    settled = torch.zeros_like(best[..., :1], dtype=torch.bool)
    for rows in (best > 0, (best > 0) & first):  # those of all rows at once, or else the best of them
        rows = rows & ~settled
        delta = torch.zeros_like(core).scatter_(3, columns, change * rows[..., None])
        falls = (_dot(delta, 2 * slope - p[:, None] @ (delta @ k)) > 0)[..., 0]
        rows = (rows & falls)[..., None]
        core = core.scatter(3, columns, torch.where(rows, values, core.gather(3, columns)))
        keep = keep.scatter(3, columns, torch.where(rows, masks[chosen], keep.gather(3, columns)))
        settled = settled | falls
    return core, keep


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2), keepdim=True)
