"""WeLore: singular values below one threshold go, and what has lost more than half of them becomes two thin matrices."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.structure import Linear, Skeleton, Structure


@spec
class WeLore(Structure):
    """W → U√Σ·√ΣVᵀ of the σ_i with (σ_i − σ_min) / (σ_max − σ_min) ≥ k, one k for all (Jaiswal et al., 2024, arXiv:2407.11239).

    A matrix that loses more than ``least`` of its singular values to the threshold k is stored as two factors (a low-rank
    component), every other one stays as it is. No data is needed. To fine-tune as the authors do, train the factors alone.

    Args:
        least: the fraction of its singular values that a matrix has to lose; 0.5 or more, so that its factors are smaller than
            itself.

    k is what removes ``sparsity`` of the parameters in the blocks, or as near to it as whole singular values allow. In the
    paper k is what removes a share of all singular values, those of matrices that then stay whole counted in.

    >>> WeLore(least=0.6)
    WeLore(least=0.6)
    """

    least: float = 0.5
    removes: ClassVar[frozenset[str]] = frozenset({"ranks"})

    def __post_init__(self) -> None:
        if not 0.5 <= self.least < 1:
            raise GossamerError(f"WeLore wants 0.5 <= least < 1; got least={self.least!r}")

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        linears = model.linears()
        values = [normal(torch.linalg.svdvals(linear.weight.float())) for linear in linears]
        for linear, own in zip(linears, values, strict=True):
            if not bool(own.isfinite().all()):
                raise ArithmeticError(f"the singular values of {linear.name} in block {linear.block} overflow")
        least = self.ranks(values, 1.0)  # of the largest one alone where that is allowed
        wanted, most = sparsity * model.parameters, sum(map(_saved, linears, least))
        if most < wanted:
            told = f"{self} can remove at most {most / model.parameters:.4f} of the parameters in the blocks"
            raise GossamerError(f"{told}; {sparsity} was asked for")
        k = self.threshold(linears, values, wanted)
        model.note(0, threshold=k)
        for rank in self.ranks(values, k):
            linear = linears.pop(0)  # what is factored is not held any longer
            if rank < linear.rank:
                u, s, v = torch.linalg.svd(linear.weight.float(), full_matrices=False)
                root = s[:rank].sqrt()
                model.factor(linear, u[:, :rank] * root, root[:, None] * v[:rank])

    def ranks(self, values: list[Tensor], k: float) -> list[int]:
        """Return how many singular values each matrix keeps: those from k up, or all of them."""
        left = [int((own >= k).sum()) for own in values]
        return [n if 1 - n / len(own) > self.least else len(own) for n, own in zip(left, values, strict=True)]

    def threshold(self, linears: list[Linear], values: list[Tensor], wanted: float) -> float:
        """Return the k that removes what is nearest to so many parameters; a larger one never removes fewer."""
        steps = torch.unique(torch.cat(values)).tolist()

        def removed(at: int) -> int:
            return sum(_saved(linear, n) for linear, n in zip(linears, self.ranks(values, steps[at]), strict=True))

        low, high = 0, len(steps) - 1  # the first removes nothing: all values are from it up
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if removed(middle) >= wanted else (middle, high)
        return float(steps[min((low, high), key=lambda at: abs(removed(at) - wanted))])


def normal(values: Tensor) -> Tensor:
    """Return singular values from 0, the least of a matrix, to 1; where all are the same, none is less than another.

    >>> normal(torch.tensor([5.0, 2.0, 1.0]))
    tensor([1.0000, 0.2500, 0.0000])
    """
    least, most = values.min(), values.max()
    return (values - least) / (most - least) if most > least else torch.ones_like(values)


def _saved(linear: Linear, rank: int) -> int:
    """Return how many parameters fewer a matrix has with so many of its singular values."""
    out, in_ = linear.weight.shape
    return out * in_ - rank * (out + in_) if rank < linear.rank else 0
