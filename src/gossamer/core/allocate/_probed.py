"""ECoFLaP: what a block is worth, from forward passes alone."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gossamer.core.allocate._declared import block_of, needs
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import check_sparsity

Losses = Sequence[Callable[[], float]]  # one a calibration window: the model's loss on it, with the weights as they are now


@needs("losses")
def ecoflap(
    tensors: Mapping[str, Tensor],
    sparsity: float,
    losses: Losses,
    *,
    margin: float = 0.1,
    eps: float = 1e-3,
    samples: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """ECoFLaP: kept entries in proportion to a block's gradient-free importance (Sung et al., 2023, arXiv:2310.02998).

    I_b = mean over windows of |L(W_b + ε z) − L(W_b − ε z)| / 2ε with z ~ N(0, 1) drawn anew for each window and only the
    weights of block b moved: a finite difference of the loss along z, which takes two forward passes and no gradient. Each
    block first keeps what a sparsity of S + margin leaves it; the rest of (1 − S)·Σ n goes to the blocks in proportion to I,
    none getting more than all its entries. All weights of a block get its sparsity. The weights are put back to the bit.

    The authors' code moves the weights of a block one at a time, and adds up what it finds: here they are moved together, in a
    seventh of the passes. What stands in no block counts as one.

    Args:
        tensors: the weights themselves; they are moved and put back.
        sparsity: fraction of zeros over all tensors, S in [0, 1).
        losses: the loss on each calibration window.
        margin: how far above S a block's sparsity may be; the paper's largest sparsity of a layer is S + margin.
        eps: ε, the length of the step for each entry.
        samples: how many windows are used, at most: 2 · samples · (number of blocks) forward passes.
        seed: of the z.

    Raises:
        GossamerError: a hyper-parameter makes no sense, there is no window, or a loss is NaN or infinite.

    >>> flat, steep = torch.zeros(4, 4), torch.zeros(4, 4)
    >>> windows = [lambda: 3 * float(steep.sum()) + float(flat.sum())] * 200
    >>> found = ecoflap({"flat": flat, "steep": steep}, 0.5, windows, samples=200)
    >>> {name: round(s, 1) for name, s in found.items()}  # all but the least goes 3 to 1
    {'flat': 0.6, 'steep': 0.4}
    """
    sparsity = check_sparsity(sparsity)
    if not (margin >= 0 and eps > 0 and samples >= 1):
        raise GossamerError(f"ecoflap wants margin >= 0, eps > 0 and samples >= 1; got {margin!r}, {eps!r} and {samples!r}")
    if not losses:
        raise GossamerError("ecoflap evaluates the loss on calibration windows, and there is none")
    blocks: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            blocks.setdefault(block_of(name), []).append(tensor)
    importance = {block: probe(inside, losses[:samples], eps, seed + i) for i, (block, inside) in enumerate(blocks.items())}
    for block, value in importance.items():
        if not math.isfinite(value):
            raise GossamerError(f"{block}: the loss beside it is NaN or infinite")
    sizes = {block: sum(tensor.numel() for tensor in inside) for block, inside in blocks.items()}
    found = shared(importance, sizes, sparsity, min(sparsity + margin, 1.0))
    return {name: found.get(block_of(name), sparsity) for name in tensors}


@torch.no_grad()
def probe(tensors: Sequence[Tensor], losses: Losses, eps: float, seed: int) -> float:
    """Return the mean of |L(W + ε z) − L(W − ε z)| / 2ε over windows, each with its own z, the tensors moved at once."""
    generator = torch.Generator().manual_seed(seed)
    before, total = [tensor.clone() for tensor in tensors], 0.0

    def move(steps: Sequence[Tensor], by: float) -> None:
        for tensor, was, step in zip(tensors, before, steps, strict=True):
            tensor.copy_(was + by * step)

    try:
        for loss in losses:
            steps = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in tensors]
            move(steps, eps)
            above = loss()
            move(steps, -eps)
            total += abs(above - loss()) / (2 * eps)
    finally:
        for tensor, was in zip(tensors, before, strict=True):
            tensor.copy_(was)
    return total / len(losses)


def shared(importance: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, most: float) -> dict[str, float]:
    """Keep (1 − most)·n of each tensor, and hand out the rest of the total in proportion to importance, up to all of each."""
    kept = {name: (1 - most) * size for name, size in sizes.items()}
    rest = (1 - sparsity) * sum(sizes.values()) - sum(kept.values())
    room = dict(sizes)  # the tensors that are not full yet
    while room and rest > 1e-9:
        worth = {name: importance[name] for name in room}
        if sum(worth.values()) <= 0:
            worth = {name: float(sizes[name]) for name in room}
        unit = rest / sum(worth.values())
        full = [name for name in room if kept[name] + unit * worth[name] >= sizes[name]]
        if not full:
            kept |= {name: kept[name] + unit * worth[name] for name in room}
            break
        rest -= sum(sizes[name] - kept[name] for name in full)
        kept |= {name: float(room.pop(name)) for name in full}
    return {name: min(max(1 - kept[name] / size, 0.0), most) for name, size in sizes.items()}
