"""GQSA: whole groups of weights go, and those that stay are integers of a few bits under one scale and one zero."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.grid import fitted, rounded, tiles, untiled
from gossamer.core.pattern import Block, Pattern
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class GQSA(Solver):
    """Keep groups by Σ w_j² / ([H⁻¹]_jj)², as s·(q − z) with q of ``bits`` bits (Zeng et al., 2024, arXiv:2412.17560).

    The groups are the tiles of the pattern, the paper's ``1x16``: 16 inputs of one output. H = X Xᵀ + λ·mean(diag)·I, and a
    group's saliency is pooled as the pattern says (its mean, unless told otherwise; of equal groups that ranks as the sum).
    The values of a group that stays are rounded to a grid of its own,

        s = (max − min) / (2^bits − 1),  z = round(−min / s),  q = clamp(round(w / s) + z, 0, 2^bits − 1),

    max and min taken with 0. What is left in the model is s·(q − z) in its dtype, so that it is measured as it will run;
    `gossamer.pack` finds the grid again and stores it as `Grouped`. Some kept weights are 0 on their grid, so that there are
    more zeros than asked for.

    This is where the paper begins, and repairs nothing. Its first stage is `Reconstruct` with bits and group, its second `OQP`.
    Where this differs: groups of one sign have 0 on their grid, and scales are rounded to bfloat16.

    Args:
        bits: of each weight, 2 to 4; None leaves the groups that stay as they are, for what is to be rounded in stage 1.
        damp: λ, as a fraction of H's mean diagonal; raised until the factorisation succeeds (reported as ``damp``).

    W has shape (out, in); sums are in float32.

    >>> stats = Stats(4, gram=True)
    >>> stats.add(torch.eye(4))
    >>> GQSA(bits=2)(torch.tensor([[1.0, -2.0, 0.4, 0.3]]), stats, Block(1, 2), 0.5)[0]
    tensor([[ 1., -2.,  0.,  0.]])
    """

    bits: int | None = 4
    damp: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Block,)

    def __post_init__(self) -> None:
        whole = self.bits is None or (type(self.bits) is int and self.bits in (2, 3, 4))
        if not whole or not 0 < self.damp < math.inf:
            raise GossamerError(f"GQSA wants bits of 2, 3, 4 or None and damp > 0; got bits={self.bits!r}, damp={self.damp!r}")

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        assert isinstance(pattern, Block)
        upper, dead, _ = stats.inverse_factor(self.damp)
        exact = w.float().masked_fill(dead, 0)  # an input that is always zero wants no room on a grid
        mask = pattern.select((exact / upper.square().sum(0)).square(), sparsity)  # [H⁻¹]_jj = Σ_i U_ij²
        exact = exact.masked_fill(~mask, 0)
        if self.bits is not None:
            groups = tiles(exact, pattern.h, pattern.w)
            exact = untiled(rounded(groups, *fitted(groups, self.bits, w.dtype), self.bits), pattern.h, pattern.w)
        return exact.to(w.dtype).contiguous(), mask
