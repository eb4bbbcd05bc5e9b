"""Depth: remove the blocks that change the hidden states least."""

from typing import ClassVar

import torch

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.structure import Skeleton, Structure, angle, cosine


@spec
class Depth(Structure):
    """Drop blocks l … l+n−1 with the least arccos(x_l·x_{l+n} / ‖x_l‖‖x_{l+n}‖) / π (Gromov et al., 2024, arXiv:2403.17887).

    x_l is the hidden state that comes to block l at the last token of a calibration window; the distance is averaged over the
    windows, and n is ``sparsity`` of the blocks, rounded.

    Args:
        consecutive: False drops the n blocks, wherever they stand, with the least influence 1 − E[x_l·x_{l+1} / ‖x_l‖‖x_{l+1}‖]
            over all tokens (Men et al., 2024, arXiv:2403.03853).

    The distances of all candidates are reported, by the first block of each.

    >>> Depth(consecutive=False)
    Depth(consecutive=False)
    """

    consecutive: bool = True
    removes: ClassVar[frozenset[str]] = frozenset({"blocks"})
    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    even: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        depth, n = model.blocks, round(sparsity * model.blocks)
        if not 0 < n < depth:
            raise GossamerError(
                f"{self} removes whole blocks: of {depth}, a sparsity of {sparsity} is {n}; give from {1 / depth:.3f} "
                f"to {(depth - 1) / depth:.3f}"
            )
        if self.consecutive:
            last: list[torch.Tensor] = []  # of x_0 … x_depth, the last token of each window
            for step in model.walk():
                if not last:
                    last.append(torch.cat([x[:, -1] for x in step.inputs]))
                last.append(torch.cat([x[:, -1] for x in step.outputs]))
            found = [float(angle(last[at], last[at + n]).mean()) for at in range(depth - n + 1)]
            first = min(range(len(found)), key=found.__getitem__)
            gone = list(range(first, first + n))
        else:
            found = []
            for step in model.walk():
                tokens = torch.cat([cosine(x, y).flatten() for x, y in zip(step.inputs, step.outputs, strict=True)])
                found.append(1 - float(tokens.mean()))
            gone = sorted(sorted(range(depth), key=found.__getitem__)[:n])
        for at, distance in enumerate(found):
            model.note(at, distance=distance)
        model.drop(gone)
