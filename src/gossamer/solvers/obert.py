"""oBERT: the optimal brain surgeon on a block-diagonal empirical Fisher matrix."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Pattern, Unstructured
from gossamer.core.solver import Solver
from gossamer.core.spec import spec
from gossamer.core.stats import Stats

# How many entries of the Fisher blocks are in memory at a time.
ENTRIES = 1 << 23


@spec
class OBERT(Solver):
    """S_Q = ½ w_Qᵀ ((F⁻¹)_QQ)⁻¹ w_Q and δw = −F⁻¹ E_Q ((F⁻¹)_QQ)⁻¹ w_Q (Kurtic et al., 2022, arXiv:2203.07259).

    F = λI + 1/N Σ g gᵀ over the gradients g of the N calibration windows, in blocks of ``block`` neighbours of an output row;
    Q is one weight, or the row piece of a tile under `Block` (1×4 and so on; a taller tile's saliency is that of its pieces
    together). All of a block that goes is taken out at once, so that δw is the minimiser of δᵀFδ with the dropped weights at
    zero, exactly; the paper does it in many small steps of training and measures F anew at each.

    The blocks are inverted by Cholesky, which is what the paper's Woodbury recursion over the gradients comes to. The paper
    ranks the weights of the whole model together; here each tensor's are ranked by themselves.

    Args:
        block: B, the side of a block of F (a multiple of a tile's width is used).
        damp: λ, as a fraction of F's mean diagonal (the paper has 1e-7 itself, and about a thousand gradients). F's rank
            is at most N: with N < ``block`` some moves cost λ alone, and a small λ makes them large and in vain. For gradients
            drawn from a known F, 1 was the best of 0.001, 0.01, 0.1, 0.3, 1 and 3 with 32 and 64 of them, and 0.1 with 1000.

    Needs a backward pass for each block of the model, which has to fit in memory together with N float32 gradients of the
    block's weights; F is that of the model with the blocks before it pruned.
    W has shape (out, in); sums are in float32, the result is cast back to W's dtype.

    >>> stats = Stats(2)
    >>> stats.grads = torch.ones(1, 1, 2)  # the loss depends on the sum of the two weights
    >>> OBERT(damp=1e-4)(torch.tensor([[1.0, 2.0]]), stats, Unstructured(), 0.5)[0].round(decimals=2)
    tensor([[0., 3.]])
    """

    block: int = 50
    damp: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"grads"})
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM, Block)

    def __post_init__(self) -> None:
        if self.block < 1 or not self.damp > 0:
            raise GossamerError(f"OBERT wants block >= 1 and damp > 0; got block={self.block!r}, damp={self.damp!r}")

    @torch.no_grad()
    def __call__(self, w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None) -> tuple[Tensor, Tensor]:
        pattern.check(w.shape)
        unit = pattern.w if isinstance(pattern, Block) else 1
        side = max(min(self.block, w.shape[1]) // unit, 1) * unit
        assert stats.grads is not None, "the windows' gradients were not asked for"
        grads = stats.grads.float()
        blocks, g = _cut(w.float(), side), _cut(grads, side)  # (blocks, side), (windows, blocks, side)
        ridge = self.damp * (float(grads.square().mean()) or 1.0)  # no gradient at all: F = λI, which ranks by magnitude
        step = max(ENTRIES // side**2, 1)

        scores = torch.empty_like(blocks)
        for part in range(0, len(blocks), step):
            now = slice(part, part + step)
            inverse = torch.cholesky_inverse(self._lower(_fisher(g[:, now], ridge)))
            pieces = blocks[now].view(-1, side // unit, unit)
            own = inverse.view(-1, side // unit, unit, side // unit, unit).diagonal(dim1=1, dim2=3).movedim(-1, 1)
            saliency = (pieces * torch.linalg.solve(own, pieces)).sum(2) / 2
            scores[now] = saliency.repeat_interleave(unit, 1)
        mask = pattern.select(_join(scores, w.shape), sparsity)

        keep = _cut(mask, side)
        for part in range(0, len(blocks), step):
            now = slice(part, part + step)
            f, stay = _fisher(g[:, now], ridge), keep[now]
            gone = blocks[now].masked_fill(stay, 0)
            pull = (f @ gone[:, :, None]).masked_fill_(~stay[:, :, None], 0)
            f *= stay[:, :, None] & stay[:, None, :]
            f.diagonal(dim1=1, dim2=2).masked_fill_(~stay, 1.0)
            blocks[now] += torch.cholesky_solve(pull, self._lower(f))[:, :, 0] - gone
        return _join(blocks, w.shape).masked_fill_(~mask, 0).to(w.dtype), mask

    def _lower(self, f: Tensor) -> Tensor:
        """Factor matrices.

        Raises:
            ArithmeticError: one is not positive definite to float32.
        """
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(f)
        if bool(failed.any()):
            raise ArithmeticError(f"the Fisher matrix is singular to float32 with damp={self.damp:g}; a larger one may do")
        return lower


def _fisher(g: Tensor, ridge: float) -> Tensor:
    """Return λI + 1/N Σ g gᵀ of some blocks, (blocks, side, side), from gradients (windows, blocks, side)."""
    f = torch.einsum("nbi,nbj->bij", g, g / len(g))
    f.diagonal(dim1=1, dim2=2).add_(ridge)
    return f


def _cut(x: Tensor, side: int) -> Tensor:
    """Cut rows, (..., out, in), into pieces of one length, the last filled up with zeros: (..., out · pieces, side)."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % side)).reshape(*x.shape[:-2], -1, side)


def _join(pieces: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_cut`."""
    return pieces.view(shape[0], -1)[:, : shape[1]].contiguous()
