"""The structured optimal brain surgeon: columns of a weight removed group by group, and what stays makes up for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

# How many groups go before the matrices are brought up to date.
BATCH = 64


@dataclass(frozen=True, eq=False)
class Removal:
    """Groups of columns in the order in which they went, and what their loss costs.

    Attributes:
        order: every group that went, first to last.
        errors: ‖(W − Ŵ)X‖² once none, one, two ... of them are gone, damping included; float64, one longer than ``order``.
    """

    order: Tensor
    errors: Tensor

    def kept(self, count: int, groups: int) -> Tensor:
        """Return which of so many groups are left, ascending, once ``count`` have gone."""
        there = torch.ones(groups, dtype=torch.bool)
        there[self.order[:count]] = False
        return there.nonzero()[:, 0]


@torch.no_grad()
def remove(w: Tensor, inverse: Tensor, width: int, count: int) -> tuple[Removal, Tensor, Tensor]:
    """Remove groups of ``width`` neighbouring columns, at each step the one whose loss costs least.

    The cost of S is Σ_i W_i,S ((H⁻¹)_SS)⁻¹ W_i,Sᵀ; then W ← W − W_:,S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S,:, which leaves the best weights on
    the columns that stay, and H⁻¹ ← H⁻¹ − (H⁻¹)_:,S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S,:, which is the inverse of H without S.

    Args:
        w: the weight, (out, in), float32 or float64.
        inverse: H⁻¹, (in, in), H the Gram matrix of the inputs with its damping.
        width: columns in a group; it divides in.
        count: how many groups to remove.

    Returns:
        The removal; W with zero columns where they went; H⁻¹ with zero rows and columns there.

    Source: Kurtic et al., ZipLM, 2023, arXiv:2302.04089.

    >>> w, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that are nearly the same
    >>> removal, left, _ = remove(w, torch.linalg.inv(h), 1, 1)
    >>> removal.order, left.round(decimals=3)
    (tensor([0]), tensor([[0.0000, 2.9000]]))
    """
    out, in_ = w.shape
    at = torch.arange(in_ // width, device=w.device)  # which groups are still carried
    both = torch.cat([inverse, w])  # H⁻¹ and W go through the same elimination
    order, costs = torch.empty(0, dtype=torch.int64), [torch.zeros(1, dtype=torch.float64)]
    while len(order) < count:
        now, cost = _batch(both, out, width, min(BATCH, count - len(order)))
        order, costs = torch.cat([order, at[now].cpu()]), [*costs, cost.double().cpu()]
        stays = torch.ones(len(at), dtype=torch.bool, device=w.device)
        stays[now] = False
        columns = stays.repeat_interleave(width)
        both = both[torch.cat([columns, columns.new_ones(out)])][:, columns]
        at = at[stays]
    columns = (at[:, None] * width + torch.arange(width, device=w.device)).flatten()
    left, rest = torch.zeros_like(w), torch.zeros_like(inverse)
    left[:, columns] = both[len(columns) :]
    rest[columns[:, None], columns] = both[: len(columns)]
    return Removal(order, torch.cat(costs).cumsum(0)), left, rest


def _batch(both: Tensor, out: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Remove some groups of H⁻¹ and W, one below the other in ``both``, and bring these up to date once, at the end.

    Until then they are what they were, less Σ aᵀp and Σ v·p, with a the row block (H⁻¹)_S,: and v the columns W_:,S as they
    were when S went, and p = ((H⁻¹)_SS)⁻¹ a. What costs need is kept up to date: (H⁻¹)_TT and W_:,Tᵀ W_:,T of every T.
    Returns which went, and what each cost. With groups of one column the device is not waited for at any step.
    """
    n = both.shape[1] // width
    hinv, w = both[: n * width], both[n * width :]
    own = hinv.view(n, width, n, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    theirs = w.view(out, n, width).transpose(0, 1)
    gram = theirs.transpose(1, 2) @ theirs
    a, p = (both.new_zeros(count * width, n * width) for _ in range(2))
    v = both.new_zeros(out, count * width)
    dead = torch.zeros(n, dtype=torch.bool, device=both.device)
    eye = torch.eye(width, dtype=both.dtype, device=both.device)
    within = torch.arange(width, device=both.device)
    order, costs = [], []

    def cut(x: Tensor) -> Tensor:
        """Return of each group its own columns."""
        return x.view(width, n, width).transpose(0, 1)

    for step in range(count):
        cost = gram[:, 0, 0] / own[:, 0, 0] if width == 1 else torch.linalg.solve(own, gram).diagonal(dim1=1, dim2=2).sum(1)
        best = cost.masked_fill(dead, torch.inf).argmin(0, keepdim=True)
        gone, new = best * width + within, slice(step * width, (step + 1) * width)
        a_new = hinv[gone] - a[: new.start, gone].T @ p[: new.start]
        v_new = w[:, gone] - v[:, : new.start] @ p[: new.start, gone]
        p_new = a_new / own[best, 0] if width == 1 else torch.linalg.solve(own[best][0], a_new)
        along = cut(v_new.T @ w - (v_new.T @ v[:, : new.start]) @ p[: new.start])  # W_:,Sᵀ W_:,T
        pull = cut(p_new)
        own -= _each(cut(a_new), pull)
        twice = _each(along, pull)
        gram += (
            _each(pull, (v_new.T @ v_new) @ pull if width > 1 else v_new.square().sum() * pull) - twice - twice.transpose(1, 2)
        )
        a[new], p[new], v[:, new] = a_new, p_new, v_new
        dead.index_fill_(0, best, True)
        own = torch.where(dead[:, None, None], eye, own)
        order.append(best)
        costs.append(cost[best].clamp(min=0))
    hinv.addmm_(a.T, p, alpha=-1)
    w.addmm_(v, p, alpha=-1)
    return torch.cat(order), torch.cat(costs)


def _each(x: Tensor, y: Tensor) -> Tensor:
    """Return xᵀy of each group, (groups, width, width)."""
    return x * y if x.shape[1] == 1 else x.transpose(1, 2) @ y


@torch.no_grad()
def refit(w: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """Return W with its best values on the kept columns, (W H)_:,K (H_KK)⁻¹, and zeros elsewhere; what `remove` comes to."""
    found = torch.zeros_like(w)
    lower = torch.linalg.cholesky(h[kept[:, None], kept])
    found[:, kept] = torch.cholesky_solve((w @ h[:, kept]).T, lower).T
    return found
