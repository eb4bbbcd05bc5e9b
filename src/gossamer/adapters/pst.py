"""PST: a mask that is learnt beside a low-rank update, both from few parameters, while the model becomes sparse."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.adapters._config import Method, SparseConfig, check_rank
from gossamer.adapters._linear import Adapter, cast, plus_product
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern, Unstructured
from gossamer.core.schedule import Cubic
from gossamer.sites._job import pattern_of


class PST(Adapter):
    """W' = (W + β·UV) ⊙ M, M the best of S = |W + β·UV| + α1·AB + α2·(R1ᵀ + 1Cᵀ); V = B = R = C = 0 at the start."""

    keeps: ClassVar[bool] = False
    step: Tensor

    def __init__(self, config: Any, w: Tensor) -> None:
        super().__init__(config, w)
        (out, in_), r = w.shape, config.r
        self.pattern: Pattern = config.shape
        self.sparsity, self.progress = self.pattern.resolve(config.sparsity), config.progress
        self.pattern.check(w.shape, "it")
        self.factors = config.beta, config.alpha1, config.alpha2
        self.U, self.V = nn.Parameter(torch.randn(out, r)), nn.Parameter(torch.zeros(r, in_))
        self.A, self.B = nn.Parameter(torch.randn(out, r)), nn.Parameter(torch.zeros(r, in_))
        self.R, self.C = nn.Parameter(torch.zeros(out)), nn.Parameter(torch.zeros(in_))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def advance(self) -> None:
        self.step += 1

    @torch.no_grad()
    def scores(self, w: Tensor) -> Tensor:
        beta, alpha1, alpha2 = self.factors
        u, v, a, b, r, c = (p.float() for p in self.parameters())
        with torch.autocast(w.device.type, enabled=False):
            score: Tensor = torch.addmm(w.float(), u, v, alpha=beta).abs_()
            return score.addmm_(a, b, alpha=alpha1).add_(r[:, None] + c, alpha=alpha2)

    def merged(self, w: Tensor) -> Tensor:
        mask = self.pattern.select(self.scores(w), self.sparsity)
        parameters: list[Any] = [*cast(self.parameters(), w), mask, *self.factors]
        return torch.where(mask, self.weight(w, *parameters), 0)

    def scheduled(self, w: Tensor) -> Tensor:
        """Return the mask of the step in hand: S's best, of which there are fewer the further the schedule is.

        A pattern that fixes its own sparsity prunes those of its entries first that score lowest.
        """
        done, scores = self.progress(int(self.step)), self.scores(w)
        if self.sparsity is not None and self.pattern.sparsity is None:
            return self.pattern.select(scores, done * self.sparsity)
        mask: Tensor = self.pattern.select(scores, self.sparsity)
        if done < 1:
            spared = round((1 - done) * int((~mask).sum()))
            late = scores.masked_fill(mask, -torch.inf).flatten().topk(spared).indices
            mask.view(-1)[late] = True
        return mask

    def constants(self, w: Tensor) -> tuple[Any, ...]:
        return (self.scheduled(w), *self.factors)

    @staticmethod
    def weight(
        w: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, r: Tensor, c: Tensor, mask: Tensor, *factors: float
    ) -> Tensor:
        return plus_product(w, u, v, factors[0]) * mask.view(torch.int8)

    @staticmethod
    def gradients(
        g: Tensor, w: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, r: Tensor, c: Tensor, mask: Tensor, *factors: float
    ) -> tuple[Tensor, ...]:
        beta, alpha1, alpha2 = factors
        full = plus_product(w, u, v, beta)
        ds = g * full  # straight through: M's gradient is taken for S's
        d = g.mul_(mask.view(torch.int8)).add_(ds * full.sign())
        return (
            *((d @ v.t()).mul_(beta), (u.t() @ d).mul_(beta)),
            *((ds @ b.t()).mul_(alpha1), (a.t() @ ds).mul_(alpha1)),
            *(ds.sum(1).mul_(alpha2), ds.sum(0).mul_(alpha2)),
        )


@dataclass
class PSTConfig(SparseConfig):
    """PST in peft: W' = (W + β·UV) ⊙ M, where M keeps the best of S = |W + β·UV| + α1·AB + α2·(R1ᵀ + 1Cᵀ).

    M is chosen anew in every forward pass; its gradient is taken for S's (straight-through), |W + β·UV| included. The sparsity
    rises from 0 by a cubic schedule over ``steps``, which ``model.base_model.follow(optimizer)`` counts. Merged, the weights
    have the final pattern's zeros, wherever the schedule is.

    Args:
        steps: how many optimizer steps there will be.
        pattern, sparsity: what the zeros follow, as in `gossamer.prune`.
        r: the rank of UV and of AB.
        beta, alpha1, alpha2: the weights of the update and of the two parts of the learnt importance.
        warmup, cooldown: the parts of ``steps`` at 0 and at the full sparsity.
        target_modules, exclude_modules, modules_to_save: as in peft; by default every linear in the blocks.

    Raises:
        GossamerError: an argument it does not take, no steps, a rank below 1, or a pattern that does not fit.

    Source: PST (Li et al., 2022, arXiv:2205.11005).

    >>> PSTConfig(steps=100, pattern="2:4").progress(50)
    0.875
    """

    steps: int = 0
    pattern: str = "Unstructured"
    sparsity: float | None = None
    r: int = 8
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    warmup: float = 0.1
    cooldown: float = 0.1
    method: ClassVar[Method] = Method.PST
    adapter: ClassVar[type[Adapter]] = PST

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r)
        if self.steps < 1:
            raise GossamerError("PST has a schedule: say over how many optimizer steps, PSTConfig(steps=...)")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown >= 1:
            raise GossamerError(f"warmup and cooldown are parts of the steps, below 1 together: {self.warmup}, {self.cooldown}")
        pattern_of(self.pattern).resolve(self.sparsity)

    @property
    def shape(self) -> Pattern:
        """The pattern; the tensor is what competes where the pattern leaves that open."""
        shape = pattern_of(self.pattern)
        return Unstructured("tensor") if shape == Unstructured() else shape

    @property
    def progress(self) -> Cubic:
        """How far the sparsity is at a step: from 0 to 1."""
        begin = round(self.warmup * self.steps)
        return Cubic(0.0, 1.0, steps=max(round((1 - self.warmup - self.cooldown) * self.steps), 1), begin=begin)
