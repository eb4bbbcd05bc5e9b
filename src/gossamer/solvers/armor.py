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

    Where this differs from the paper: A, B and S take exact or conjugate-gradient steps, and few, where the paper takes some
    thousand of Adam; the group is the best one where the paper draws one by its gradient; and the norms of dead inputs are
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
            raise GossamerError(f"ARMOR(block={self.block}) wants sizes that the block divides; {name} is {shape[0]}x{shape[1]}")

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> Factors:
        assert isinstance(pattern, NM)
        self.check((w.shape[0], w.shape[1]), pattern)
        least = torch.finfo(torch.float32).tiny
        exact = w.float()
        columns = exact.norm(dim=0).clamp_min(least)
        rows = (exact / columns).norm(dim=1).clamp_min(least)
        unit = exact / columns / rows[:, None]
        mask = pattern.select((unit * stats.norm).square(), sparsity)

        # In blocks, (block of A, block of B, row, column); the norms of the inputs are in the target and in B.
        d, size = self.block, stats.norm / stats.norm.mean().clamp_min(least)
        size = torch.where(stats.norm.any(), size.clamp_min(1e-4), torch.ones_like(size))
        target, core, keep = _blocks(unit * size, d), _blocks(unit * mask, d), _blocks(mask, d)
        left = torch.eye(d, device=w.device).repeat(len(target), 1, 1)
        right = torch.diag_embed(size.view(-1, d))
        start = loss = (target - core @ right).square().sum()
        best = left, core, right
        for _ in range(self.steps):
            left = left + _fit_left(target, left, core, right)
            right = right + _fit_right(target, left, core, right)
            core = core + _fit_core(target, left, core, right, keep, self.inner)
            core, keep = _swap(target, left, core, right, keep, pattern)
            now = (target - _product(left, core, right)).square().sum()
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
    return matrix.unflatten(1, (-1, d)).unflatten(0, (-1, d)).transpose(1, 2).contiguous()


def _product(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    return left[:, None] @ core @ right


def _solve(h: Tensor, g: Tensor) -> Tensor:
    """Return H⁻¹ G for each pair of a batch, H positive semidefinite and a little damped."""
    mean = h.diagonal(dim1=1, dim2=2).mean(1)
    h = h + (DAMP * mean + torch.finfo(h.dtype).tiny)[:, None, None] * torch.eye(h.shape[-1], device=h.device)
    return torch.linalg.solve(h, g)


def _fit_left(target: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """How far A moves to its optimum: R Yᵀ (Y Yᵀ)⁻¹ for each block of A, Y = S B, R what is left of the target."""
    y = core @ right
    rest = target - left[:, None] @ y
    h, g = (y @ y.mT).sum(1), (y @ rest.mT).sum(1)
    return _solve(h, g).mT


def _fit_right(target: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """How far B moves to its optimum: (Zᵀ Z)⁻¹ Zᵀ R for each block of B, Z = A S."""
    z = left[:, None] @ core
    rest = target - z @ right
    return _solve((z.mT @ z).sum(0), (z.mT @ rest).sum(0))


def _fit_core(target: Tensor, left: Tensor, core: Tensor, right: Tensor, keep: Tensor, steps: int) -> Tensor:
    """How far S moves: conjugate gradients for Aᵀ A Δ B Bᵀ = Aᵀ R Bᵀ on what is kept, a system for each block of the core."""
    p, k = (left.mT @ left)[:, None], right @ right.mT
    scale = p.diagonal(dim1=2, dim2=3)[..., None] * k.diagonal(dim1=1, dim2=2)[:, None, :]  # of the diagonal
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    rest = (left.mT[:, None] @ (target - _product(left, core, right)) @ right.mT) * keep
    move, z = torch.zeros_like(core), rest / scale
    way, size = z, _dot(rest, z)
    for _ in range(steps):
        pushed = (p @ way @ k) * keep
        step = size / _dot(way, pushed).clamp_min(torch.finfo(size.dtype).tiny)
        move, rest = move + step * way, rest - step * pushed
        z = rest / scale
        before, size = size, _dot(rest, z)
        way = z + size / before.clamp_min(torch.finfo(size.dtype).tiny) * way
    return move


def _swap(target: Tensor, left: Tensor, core: Tensor, right: Tensor, keep: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Give groups of the core the mask and values that lower the loss most, where it falls; return S and M."""
    d, n, m = core.shape[-1], pattern.n, pattern.m
    p, k = left.mT @ left, right @ right.mT
    slope = left.mT[:, None] @ (target - _product(left, core, right)) @ right.mT
    within = k.unflatten(1, (-1, m)).unflatten(3, (-1, m)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # m x m, of each group
    alone = p.diagonal(dim1=1, dim2=2)[:, None, :, None, None].clamp_min(torch.finfo(p.dtype).tiny)
    groups = core.unflatten(3, (-1, m))  # (block of A, block of B, row, group, m)
    pull = slope.unflatten(3, (-1, m)) / alone + torch.einsum("abrgi,bgij->abrgj", groups, within)
    # With all else as it is, a group's loss is, up to a constant, s K sᵀ − 2 s pull: at a mask's optimum, − s pull.
    values, masks = torch.zeros_like(groups), torch.zeros_like(groups, dtype=torch.bool)
    gains = torch.full(groups.shape[:-1], -torch.inf, device=core.device)
    for kept in itertools.combinations(range(m), n):
        at = torch.tensor(kept, device=core.device)
        h = within[:, :, at[:, None], at].flatten(0, 1)
        inverse = _solve(h, torch.eye(n, device=h.device).expand_as(h)).unflatten(0, within.shape[:2])
        part = pull[..., at]
        found = torch.einsum("abrgi,bgij->abrgj", part, inverse)
        gain = (found * part).sum(-1)
        better = gain > gains
        gains = torch.where(better, gain, gains)
        values = torch.where(better[..., None], torch.zeros_like(values).index_copy_(-1, at, found), values)
        masks = torch.where(better[..., None], torch.zeros_like(masks[0, 0, 0, 0]).index_fill_(0, at, True), masks)
    now = (groups * (2 * pull - torch.einsum("abrgi,bgij->abrgj", groups, within))).sum(-1)
    gains = (gains - now) * alone[..., 0]

    best = gains == gains.amax(-1, keepdim=True)  # of each row
    single = best & (gains == gains.amax((-1, -2), keepdim=True))
    single = single & (single.flatten(2).cumsum(-1).view_as(single) == 1)  # the first of equal ones
    done = torch.zeros_like(gains[..., 0, 0], dtype=torch.bool)
    for chosen in (best, single):
        chosen = chosen & (gains > 0) & ~done[..., None, None]
        change = torch.where(chosen[..., None], values - groups, 0.0).flatten(3)
        falls = (change * (2 * slope - p[:, None] @ change @ k)).sum((-1, -2)) > 0
        chosen = chosen & falls[..., None, None]
        core = torch.where(chosen[..., None], values, core.unflatten(3, (-1, m))).flatten(3)
        keep = torch.where(chosen[..., None], masks, keep.unflatten(3, (-1, m))).flatten(3)
        done = done | falls
    return core, keep


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-1, -2), keepdim=True)
