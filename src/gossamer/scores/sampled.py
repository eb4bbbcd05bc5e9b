"""Sampled: a mask drawn at random, in the proportions of a score."""

from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.score import Score
from gossamer.core.spec import show, spec
from gossamer.core.stats import Stats


@spec
class Sampled(Score):
    """S' = S / E, E ~ Exp(1): the k best are k entries drawn with probabilities ∝ S (Bar and Giryes, 2023, arXiv:2305.17559).

    A mask seen as a sketch of W X: entries are drawn without replacement, one after the other, each with a probability
    proportional to its score among those left, so counts are exact under every pattern. For the linear map that the paper
    analyses the best probabilities are |w_ij|·‖X_j‖, which is ``Sampled(Wanda)``; without data, ``Sampled(Magnitude)``. The
    paper draws with replacement, and so keeps fewer distinct entries than it draws.

    The draw is the same for the same seed and shape on every device. An entry of score zero goes last.

    Args:
        score: any score without negative values.

    >>> from gossamer.scores import Magnitude
    >>> w = torch.tensor([[3.0, 1.0]]).repeat(10_000, 1)
    >>> drawn = Sampled(Magnitude())(w, Stats(2)).argmax(1)
    >>> round(float((drawn == 0).float().mean()), 1)  # 3 of 4
    0.8
    """

    score: Score
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """what its score needs"""
        return self.score.needs

    @property
    def per(self) -> Literal["tensor", "row"]:  # type: ignore[override]
        return self.score.per

    @property
    def rounds(self) -> int:  # type: ignore[override]
        return self.score.rounds

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        score = self.score(x, stats)
        if bool((score < 0).any()):
            raise GossamerError(f"{show(self)} draws in proportion to a score, and {show(self.score)} has negative values")
        generator = torch.Generator().manual_seed(self.seed)
        race = torch.empty(x.shape).exponential_(generator=generator).clamp_min(1e-12)
        return score / race.to(score.device)
