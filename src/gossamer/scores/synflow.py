"""SynFlow: what each weight lets through of a signal that all paths carry."""

from typing import ClassVar

from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.score import Score
from gossamer.core.spec import spec
from gossamer.core.stats import Stats


@spec
class SynFlow(Score):
    """S = |w|·∂R/∂|w|, R = Σ outputs of the linearised |model| for ones. Data-free (Tanaka et al., 2020, arXiv:2006.05467).

    The density falls exponentially: after round k of ``rounds`` it is (1 − S)^(k/rounds), and every round scores what is left
    anew, which is what keeps a layer from being pruned away whole. With allocate="global_" the method is the paper's. A pattern
    that fixes its own sparsity has one round.

    A transformer is no chain of ReLU layers, so what "linearised" means is defined here. One position is fed, its embedding all
    ones. Every parameter is its absolute value. A norm divides by the root mean square, held constant; an activation is the
    identity; attention over one position puts out v, as in any model, and its logit q·k, which the softmax of one position
    hides, enters as the factor q·k / (q·k held constant) = 1, so that q and k carry the flow that v does. (A model that does
    not get its attention from transformers' interface keeps its softmax: its q and k carry none.) Where signals multiply, each
    factor carries the flow of the product. The scores of a layer sum to the flow through it, which is the paper's conservation
    law: equal for q, k, v and o of an attention, and for gate, up and down of an MLP; what a residual takes past a layer is not
    in it. A weight that no flow comes to, such as that of an expert not chosen, is ranked by magnitude.

    Args:
        rounds: n; the paper uses 100.

    >>> import torch
    >>> stats = Stats(2)
    >>> stats.synflow = torch.tensor([[0.5, 3.0]])
    >>> SynFlow()(torch.tensor([[-2.0, 1.0]]), stats)
    tensor([[1., 3.]])
    """

    rounds: int = 100
    needs: ClassVar[frozenset[str]] = frozenset({"synflow"})

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise GossamerError(f"SynFlow(rounds=...) is an integer of 1 or more; got {self.rounds!r}")

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        assert stats.synflow is not None
        return x.float().abs() * stats.synflow
