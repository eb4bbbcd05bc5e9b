"""Adapt-Pruner: a little goes at a time, more of it from blocks that change the hidden states less."""

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.structure import Group, Skeleton, Structure, cosine


@spec
class AdaptPruner(Structure):
    """Drop least Σ|w·∂L/∂w|, s_l of block l, s_l ← clip(s_l + Δ − A·I_l, 0, 0.99) (Pan et al., 2025, arXiv:2502.03460).

    In rounds, each on the model that the last one left: I_l is 1 − cos(x_l, x_{l+1}) between the hidden states before and
    after block l, averaged over all tokens, less its mean over the blocks, divided by the largest deviation, so in [−1, 1].
    s_l is the fraction of the first model's channels, and of its head groups, that is gone from block l. Which ones go says
    the sum of |w·∂L/∂w| over all of a member's weights, L the next-token loss on the calibration windows.

    Args:
        amplitude: A, how much more than the mean the block that changes the states least loses in a round.
        step: the fraction of the parameters in the blocks that goes in a round; the last one takes the rest of ``sparsity``.
        multiple: channels are counted in multiples of this.

    The authors give Δ and stop once the model is small enough; here Δ is what makes each round end at its total, so that the
    last does too. Their script, unless told otherwise, leaves out the first three blocks (and the last of LLaMA's 32), of
    pruning and of the mean and the deviation in I_l; here every block takes part, as in their experiments with training.
    No member comes back, should its block's s_l fall, nor if a later round fails: then the model is what the last one left. A
    round takes one forward pass and one with gradients of all weights that go with members, in float32; biases and norms are
    not scored.

    >>> AdaptPruner(step=0.05)
    AdaptPruner(step=0.05)
    """

    amplitude: float = 0.02
    step: float = 0.02
    multiple: int = 8
    removes: ClassVar[frozenset[str]] = frozenset({"channels", "heads"})
    needs: ClassVar[frozenset[str]] = frozenset({"states", "grad"})

    def __post_init__(self) -> None:
        if not self.amplitude >= 0 or not 0 < self.step < 1 or self.multiple < 1:
            raise GossamerError(
                f"AdaptPruner wants amplitude >= 0, 0 < step < 1 and multiple >= 1; got amplitude={self.amplitude!r}, "
                f"step={self.step!r}, multiple={self.multiple!r}"
            )

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        whole = [group.bare() for kind in ("heads", "channels") for group in model.groups(kind)]
        total, blocks = model.parameters, model.blocks
        gone = [0] * len(whole)
        most = _size(whole, self._gone(whole, [0.99] * blocks, gone))
        if most < sparsity * total:
            told = f"{self} can remove at most {most / total:.4f} of the parameters in the blocks"
            raise GossamerError(f"{told}; {sparsity} was asked for")
        s = [0.0] * blocks
        for place in range(1, math.ceil(sparsity / self.step - 1e-9) + 1):
            importance = model.once(f"importance-{place}", lambda: self._importance(model))["importance"].tolist()
            s = self._fractions(whole, s, importance, gone, min(place * self.step, sparsity) * total)
            wanted = self._gone(whole, s, gone)
            if wanted != gone:
                left = [group.count - n for group, n in zip(whole, wanted, strict=True)]
                stay = model.once(f"round-{place}", partial(_best, model, left))
                for group in [group for kind in ("heads", "channels") for group in model.groups(kind)]:
                    model.keep(group, stay[f"{group.kind}-{group.block}"])
            gone = wanted
            for block in range(blocks):
                model.note(block, importance=importance[block], fraction=s[block])

    def _importance(self, model: Skeleton) -> dict[str, Tensor]:
        """Return I_l of every block as it is now."""
        found = []
        for step in model.walk():
            tokens = torch.cat([cosine(x, y).flatten() for x, y in zip(step.inputs, step.outputs, strict=True)])
            found.append(1 - float(tokens.mean()))
        return {"importance": torch.tensor(scaled(found), dtype=torch.float64)}

    def _fractions(
        self, whole: list[Group], s: list[float], importance: list[float], gone: list[int], removed: float
    ) -> list[float]:
        """Return the next s_l, with the Δ that takes away what is nearest to so many parameters."""

        def moved(delta: float) -> list[float]:
            return [min(max(one + delta - self.amplitude * i, 0.0), 0.99) for one, i in zip(s, importance, strict=True)]

        def size(delta: float) -> int:
            return _size(whole, self._gone(whole, moved(delta), gone))

        low, high = -1 - self.amplitude, 1 + self.amplitude  # nothing more goes, and all that can
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if size(middle) >= removed else (middle, high)
        return moved(min((high, low), key=lambda delta: abs(size(delta) - removed)))

    def _gone(self, whole: list[Group], s: list[float], before: list[int]) -> list[int]:
        """Return how many of each group's members are gone at these fractions, where a multiple stays; none comes back."""
        units = [min(self.multiple, group.count) if group.kind == "channels" else 1 for group in whole]
        left = [math.ceil((1 - s[g.block]) * g.count / unit - 1e-9) * unit for g, unit in zip(whole, units, strict=True)]
        return [max(gone, group.count - n) for gone, group, n in zip(before, whole, left, strict=True)]


def _best(model: Skeleton, left: list[int]) -> dict[str, Tensor]:
    """Return which members stay of each group, so many of it."""
    pairs = zip(model.gradients("heads", "channels"), left, strict=True)
    return {f"{g.kind}-{g.block}": taylor(g, slopes).topk(n).indices.sort().values for (g, slopes), n in pairs}


def _size(whole: list[Group], gone: list[int]) -> int:
    return sum(n * group.size for n, group in zip(gone, whole, strict=True))


def scaled(importance: list[float]) -> list[float]:
    """Return the deviations from the mean, the largest of them 1 or −1.

    >>> scaled([0.0, 0.25, 1.25])
    [-0.6666666666666666, -0.3333333333333333, 1.0]
    """
    mean = sum(importance) / len(importance)
    widest = max(abs(one - mean) for one in importance)
    return [(one - mean) / widest if widest else 0.0 for one in importance]


def taylor(group: Group, slopes: Group) -> Tensor:
    """Return Σ|w·∂L/∂w| of each member, shape (count,), float32; higher = keep."""
    found = (group.out.float() * slopes.out).abs().reshape(len(group.out), group.count, -1).sum((0, 2))
    for w, slope in zip(group.into, slopes.into, strict=True):
        found += (w.float() * slope).abs().sum(1)
    return found
