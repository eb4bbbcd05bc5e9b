"""CFSP: how many channels a block keeps follows from how far it turns the hidden states, and which ones from activations."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.stats import Stats
from gossamer.core.structure import Group, Skeleton, Structure, angle, counts


@spec
class CFSP(Structure):
    """Keep MLP channels by E_i[Σ_W r(W)_ij] · ‖x_j‖, as many as a block's angle earns (Wang et al., 2024, arXiv:2409.13199).

    Coarse: block l keeps a fraction of its channels proportional to σ(a·(θ_l − mean θ)), θ_l the mean over all tokens of
    arccos(x·y / ‖x‖‖y‖) / π between the hidden states x before and y after it. Fine: channel j of a block is scored

        s_j = (r(|W_down|·‖x‖^b)_j + r(|W_up|)_j + r(|W_gate|)_j) · ‖x_j‖^c

    with ‖x_j‖ the norm of the channel's activations, and r_j the mean over the channel's entries of each one's share of the sum
    of |W| over all channels. One forward pass; no weight is changed.

    Args:
        a: how strongly the blocks differ; 26.2 is what the authors' code has for 128 windows of 2048 tokens.
        b, c: powers of the norm; 1 in the paper.
        multiple: counts of channels are multiples of this (the paper has 128).
        share: "channels" as above; "entries" takes each entry's share of its own channel's sum, as the authors' code does:
            then r_j is the same for all channels, and s_j ranks as ‖x_j‖^c. "channels" was better where it was measured.

    ``sparsity`` is of all parameters in the blocks, all of it taken from the MLPs.

    >>> CFSP(multiple=128)
    CFSP(multiple=128)
    """

    a: float = 26.2
    b: float = 1.0
    c: float = 1.0
    multiple: int = 8
    share: str = "channels"
    removes: ClassVar[frozenset[str]] = frozenset({"channels"})
    needs: ClassVar[frozenset[str]] = frozenset({"states", "norm"})

    def __post_init__(self) -> None:
        if self.multiple < 1 or self.share not in ("channels", "entries"):
            raise GossamerError(
                f"CFSP wants multiple >= 1 and share 'channels' or 'entries'; got {self.multiple!r}, {self.share!r}"
            )

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        groups = model.groups("channels")
        whole = sum(group.count * group.size for group in groups)
        stay = whole - sparsity * model.parameters
        counts(groups, [1.0] * len(groups), stay, multiple=self.multiple)  # raises before the pass if there is no such total
        scores, angles = [], []
        for step in model.walk("channels"):
            pairs = zip(step.inputs, step.outputs, strict=True)
            angles.append(float(torch.cat([angle(x, y).flatten() for x, y in pairs]).mean()))
            scores.append(self.score(groups[step.block], step.stats["channels"]))
        mean = sum(angles) / len(angles)
        earned = [1 / (1 + math.exp(-self.a * (theta - mean))) for theta in angles]
        kept = counts(groups, _fractions(earned, stay / whole), stay, multiple=self.multiple)
        for group, score, theta, n in zip(groups, scores, angles, kept, strict=True):
            model.note(group.block, angle=theta)
            model.keep(group, score.topk(n).indices.sort().values)

    def score(self, group: Group, stats: Stats) -> Tensor:
        """Return s_j of each channel, shape (channels,), float32; higher = keep."""
        norm = stats.norm
        matrices = [group.out.float().abs().T * norm[:, None] ** self.b, *(w.float().abs() for w in group.into)]
        over = 0 if self.share == "channels" else 1
        relative = sum((w / w.sum(over, keepdim=True).clamp_min(1e-30)).mean(1) for w in matrices)
        return relative * norm**self.c


def _fractions(earned: list[float], density: float) -> list[float]:
    """Return what each block keeps: proportional to what it earned, ``density`` on average, drawn together if one is over 1."""
    mean = sum(earned) / len(earned)
    spread = max(earned) - mean
    limit = mean / density - mean  # how far above the mean one may be
    draw = min(1.0, limit / spread) if spread > 0 else 1.0
    return [density * (1 + draw * (e - mean) / mean) for e in earned]
