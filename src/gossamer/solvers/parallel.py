"""Parallel: any method, on the dense model's inputs and not on what the pruned layers before it put out."""

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern
from gossamer.core.score import Score
from gossamer.core.solver import Around, Solver
from gossamer.core.spec import spec
from gossamer.core.stats import INPUTS, Stats


@spec
class Parallel(Around):
    """Minimise ‖W X̃ − Ŵ X̃‖², X̃ the dense model's input: each layer by itself (Aghasi et al., 2017, arXiv:1611.05162).

    Net-Trim prunes a network in two ways: in parallel, where each layer sees the inputs that it had in the dense model, and in
    cascade, where it sees what the layers pruned before it put out, and answers as the dense layer did to the dense inputs. The
    first is ``Parallel(NetTrim())``, the second ``Asymmetric(NetTrim())``. A method by itself stands between them: it sees the
    pruned layers' outputs, and answers as the dense weight would to these.

    Args:
        method: what is given those inputs.

    The dense model goes through the same windows beside the pruned one, block by block: a second forward pass, a copy of one
    block, and the method's own statistics once more. Where the rows of the two models are not the same tokens (routed experts),
    the method sees the pruned model's inputs.

    >>> from gossamer.core.pattern import Unstructured
    >>> from gossamer.scores import Wanda
    >>> stats = Stats(2)
    >>> stats.add(torch.tensor([[4.0, 1.0]]))  # of the pruned model
    >>> stats.dense = Stats(2)
    >>> stats.dense.add(torch.tensor([[1.0, 4.0]]))
    >>> Parallel(Wanda())(torch.ones(1, 2), stats, Unstructured(), 0.5)[0]
    tensor([[0., 1.]])
    """

    method: Score | Solver

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.needs & {"cross", "dense"}:
            raise GossamerError(f"{self.method!r} looks at both models' inputs itself: take it alone")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """dense, and what its method needs"""
        return frozenset({"dense"}) | self.method.needs

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        seen = stats.dense if stats.dense is not None and stats.dense.tokens == stats.tokens else stats
        for need in self.method.needs - INPUTS:  # gradients are of the weight and not of its input
            setattr(seen, need, getattr(stats, need))
        found, mask = self.inside(w, seen, pattern, sparsity)
        stats.damping, stats.dead = seen.damping, seen.dead
        stats.notes.update(seen.notes)
        return found, mask
