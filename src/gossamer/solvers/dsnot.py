"""DSnoT: swap pruned weights for kept ones until the expected error of each output is small."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern, Unstructured
from gossamer.core.score import Score
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class DSnoT(Solver):
    """Grow and prune until |e_i|, e_i = Σ_pruned W_ij·E[x_j], is small; values stay (Zhang et al., 2023, arXiv:2310.08915).

    Each row, in each cycle, with s = sign(e_i):

        grow the pruned j with the largest s·W_ij·E[x_j] / Var(x_j)^p,
        prune the kept k with the least |W_ik|·‖X_k‖₂ among those with s·W_ik·E[x_k] < 0,

    so both move e_i towards zero. A row is finished when |e_i| is below the threshold, or a swap would not make it smaller
    (the paper, which takes the swap that changes the sign of e_i and stops after it, may end above where it began). Rows keep
    their counts, and under N:M both are of one group.

    The authors' code, unless told otherwise, goes on swapping above the threshold whatever becomes of e_i, and leaves the MLPs
    as they began; under N:M what it prunes is the group's lowest score, on whichever side of zero.

    Args:
        init: the method whose mask is where it starts, a score or a solver (of which only the mask is taken); Wanda if None.
        cycles: at most how many swaps a row.
        threshold: the |e_i| that is small enough.
        power: p, how much less an input counts that varies.

    W has shape (out, in). The number of swaps is in the report (``swaps``).

    >>> stats = Stats(3, mean=True)
    >>> stats.add(torch.tensor([[1.0, 1.0, 1.0], [1.0, 3.0, 1.0]]))
    >>> DSnoT()(torch.tensor([[3.0, 1.0, -2.0]]), stats, Unstructured(), 1 / 3)[0]  # Wanda would drop the second weight
    tensor([[3., 1., 0.]])
    """

    init: Score | Solver | None = None
    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM)

    def __post_init__(self) -> None:
        if not isinstance(self.init, Score | Solver | None):
            raise GossamerError(f"DSnoT(init=...) is a score or a solver, such as Magnitude(); got {self.init!r}")
        if self.cycles < 0 or not self.threshold >= 0:
            raise GossamerError(
                f"DSnoT wants cycles >= 0 and threshold >= 0; got cycles={self.cycles!r}, threshold={self.threshold!r}"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """mean, norm, and what its start needs"""
        return frozenset({"norm", "mean"}) | (self.init.needs if self.init else frozenset())

    @property
    def per(self) -> Literal["tensor", "row"]:  # type: ignore[override]
        return self.init.per if self.init else "row"

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        importance = w.float().abs() * stats.norm
        if isinstance(self.init, Solver):
            _, mask = self.init(w, stats, pattern, sparsity)
        else:
            mask = pattern.select(self.init(w, stats) if self.init else importance, sparsity)
        mask = mask.clone()
        rows = torch.arange(len(w), device=w.device)
        group = pattern.m if isinstance(pattern, NM) else w.shape[1]
        share = w.float() * stats.mean  # what each weight adds to its output, on average
        steady = share / stats.variance.clamp_min(1e-12) ** self.power
        e = share.masked_fill(mask, 0).sum(1)
        swaps = 0
        for _ in range(self.cycles):
            sign = e.sign()[:, None]
            may_go = mask & (sign * share < 0)
            partner = may_go.view(len(w), -1, group).any(2).repeat_interleave(group, 1)
            may_come = ~mask & (sign * share > 0) & partner
            come = (sign * steady).masked_fill(~may_come, -torch.inf).argmax(1)
            near = torch.arange(w.shape[1], device=w.device) // group == (come // group)[:, None]
            go = importance.masked_fill(~(may_go & near), torch.inf).argmin(1)
            now = e - share[rows, come] + share[rows, go]
            better = may_come[rows, come] & (e.abs() > self.threshold) & (now.abs() < e.abs())
            if not bool(better.any()):
                break
            mask[rows[better], come[better]] = True
            mask[rows[better], go[better]] = False
            e = torch.where(better, now, e)
            swaps += int(better.sum())
        stats.notes["swaps"] = swaps
        return w.masked_fill(~mask, 0), mask
