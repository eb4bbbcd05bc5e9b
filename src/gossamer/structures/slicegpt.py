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
    did; Q keeps (1 − ``sparsity``) of them, in multiples of ``multiple``, and every matrix in the blocks is that much narrower.

    The paper has a Q for each attention and each MLP, and matrices QᵀQ′ on the residual path between them, which make another
    architecture; here one Q serves the whole model: nothing is added, and plain transformers opens the result. Embeddings that
    were tied to the head part from it, which takes the gain of the last norm: a small model may become larger as a whole.

    Args:
        multiple: the width that is left is a multiple of this.

    Norms that take the mean away (LayerNorm) are refused; the paper turns them into others.

    >>> SliceGPT(multiple=64)
    SliceGPT(multiple=64)
    """

    multiple: int = 8
    removes: ClassVar[frozenset[str]] = frozenset({"hidden"})
    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    even: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise GossamerError(f"SliceGPT wants multiple >= 1; got multiple={self.multiple!r}")

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        width = model.width
        stay = round((1 - sparsity) * width / self.multiple) * self.multiple
        if not 0 < stay < width:
            raise GossamerError(
                f"{self} would leave {stay} of {width} directions at a sparsity of {sparsity}; give from "
                f"{self.multiple / width:.3f} to {1 - self.multiple / width:.3f}"
            )
        gram = torch.zeros(width, width, dtype=torch.float64)
        for step in model.walk():
            for x in (*step.inputs, *(step.outputs if step.block == model.blocks - 1 else ())):
                rows = torch.nn.functional.normalize(x.flatten(0, -2).double(), dim=1)
                gram += (rows.T @ rows).cpu()
        values, vectors = torch.linalg.eigh(gram)  # ascending
        model.note(0, explained=float(values[-stay:].sum() / values.sum()))
        model.project(vectors[:, -stay:].flip(1))
