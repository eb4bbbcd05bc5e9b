"""Sweep: prune column by column, the columns to come making up for the error; what SparseGPT is, and others are built on."""

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern, kept, not_finite
from gossamer.core.stats import Stats
from gossamer.kernels._choice import choose, has_triton
from gossamer.kernels.sweep import reference

KERNELS = ("triton", "reference")
WIDEST = 256  # columns that the GPU's kernel holds in registers at a time


@torch.no_grad()
def sweep(
    w: Tensor, stats: Stats, pattern: Pattern, sparsity: float | None, damp: float, block: int, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the weight pruned under a pattern by the inverse Hessian of its inputs, and the mask; see `SparseGPT`.

    Args:
        w: (out, in); sums are in float32, the result is in its dtype.
        stats: of its inputs, with the Gram matrix.
        pattern: `Unstructured` or `NM`.
        damp: a fraction of the Hessian's mean diagonal.
        block: how many columns choose their mask together.
        kernel: who goes through the columns of a block: "triton" on a GPU, "reference" anywhere; "auto" chooses.

    Raises:
        GossamerError: a weight or its saliency became NaN or infinite, or the kernel cannot run here.
    """
    upper, dead, _ = stats.inverse_factor(damp)
    rows, columns = w.shape
    sparsity = pattern.resolve(sparsity)
    pattern.check(w.shape)
    wt = w.float().T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of W is one contiguous row
    wt[dead] = 0
    mask = torch.ones_like(wt, dtype=torch.bool)
    group = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
    step = max(block // group[1], 1) * group[1] if group else block
    columnwise = _implementation(kernel, w, step)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        u = upper[start:stop, start:stop]
        tile, keep = wt[start:stop], mask[start:stop]
        if group is None:
            # Each block's share of the exact total: what is due up to its end less what was due up to its start.
            units = rows if getattr(pattern, "per", None) != "row" else 1
            assert sparsity is not None
            due = kept(sparsity, units * stop) - kept(sparsity, units * start)
            saliency = (tile / u.diagonal()[:, None]).square_().T
            keep[:] = pattern.select(saliency, 1 - due / (units * (stop - start))).T if due else False
        error = columnwise(tile, keep, u, group)
        wt[stop:].addmm_(upper[start:stop, stop:].T, error, alpha=-1)
    if bad := not_finite(wt):
        raise GossamerError(f"{bad} of {wt.numel()} weights became NaN or infinite in the sweep over the columns")
    return wt.T.masked_fill(~mask.T, 0).to(w.dtype).contiguous(), mask.T.contiguous()


def _implementation(kernel: str, w: Tensor, step: int) -> reference.Columnwise:
    if kernel == "auto":
        kernel = "triton" if w.is_cuda and has_triton() and step <= WIDEST else "reference"
    kernel = choose(kernel, w.device, KERNELS)
    if kernel == "triton":
        from gossamer.kernels.sweep import triton

        return triton.columnwise
    return reference.columnwise
