"""SliceGPT: take the hidden states to their principal axes, and slice the last ones off every weight."""

from typing import ClassVar

import torch

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.structure import Skeleton, Structure


@spec
class SliceGPT(Structure):
    """W_in ← W_in·diag(g)·Q, W_out ← Qᵀ·W_out, Q leading eigenvectors of Σ xxᵀ/‖x‖² (Ashkboos et al., 2024, arXiv:2401.15024).

    x are the hidden states that come to the blocks, and those after the last one, at every token; g are the gains of the norms,
    which then only divide by the root mean square and so take any rotation. With all eigenvectors the model computes what it
    did; Q keeps (1 − ``sparsity``) of them, or as near to that as the model's configuration allows (many want a multiple of the
    heads), and every matrix in the blocks is that much narrower.

    The paper has a Q for each attention and each MLP, and matrices QᵀQ′ on the residual path between them, which make another
    architecture; here one Q serves the whole model: nothing is added, and plain transformers opens the result. Embeddings that
    were tied to the head part from it, which takes the gain of the last norm: a small model may become larger as a whole.

    Args:
        multiple: the width that is left is a multiple of this; a GPU is at its best with multiples of 8.

    Norms that take the mean away (LayerNorm) are refused; the paper turns them into others.

    >>> SliceGPT(multiple=64)
    SliceGPT(multiple=64)
    """

    multiple: int = 1
    removes: ClassVar[frozenset[str]] = frozenset({"hidden"})
    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    even: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise GossamerError(f"SliceGPT wants multiple >= 1; got multiple={self.multiple!r}")

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        width = model.width
        stay = self._width(model, (1 - sparsity) * width)
        gram = torch.zeros(width, width, dtype=torch.float64)
        for step in model.walk():
            for x in (*step.inputs, *(step.outputs if step.block == model.blocks - 1 else ())):
                rows = torch.nn.functional.normalize(x.flatten(0, -2).double(), dim=1)
                gram += (rows.T @ rows).cpu()
        values, vectors = torch.linalg.eigh(gram)  # ascending
        model.note(0, explained=float(values[-stay:].sum() / values.sum()))
        model.project(vectors[:, -stay:].flip(1))

    def _width(self, model: Skeleton, wanted: float) -> int:
        """Return the multiple nearest to the width wanted that the model can have."""
        why = ""
        dense = model.width
        nearest: list[int] = sorted({*range(0, dense, self.multiple), dense}, key=lambda n: abs(n - wanted))
        for width in nearest:
            if width == 0 or width == dense:
                break
            try:
                model.check_width(width)
            except GossamerError as error:  # one that the heads do not divide, say
                why = f" ({error})"
            else:
                return width
        raise GossamerError(f"{self} would leave {width} of {dense} directions: give another sparsity or multiple{why}")
