"""ECoFLaP: what a tensor is worth, from forward passes alone."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gossamer.core.allocate._declared import needs
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
    """ECoFLaP: kept entries in proportion to a gradient-free importance (Sung et al., 2023, arXiv:2310.02998).

    I_i = mean over windows of |L(W_i + ε z) − L(W_i − ε z)| / 2ε with z ~ N(0, 1) drawn anew for each window and only tensor i
    moved: a finite difference of the loss along z, which takes two forward passes and no gradient. Each tensor first keeps what
    a sparsity of S + margin leaves it; the rest of (1 − S)·Σ n goes to the tensors in proportion to I, none getting more than
    all its entries. The weights are put back to the bit.

    Args:
        tensors: the weights themselves; they are moved and put back.
        sparsity: fraction of zeros over all tensors, S in [0, 1).
        losses: the loss on each calibration window.
        margin: how far above S a tensor's sparsity may be; the paper's largest sparsity of a layer is S + margin.
        eps: ε, the length of the step for each entry.
        samples: how many windows are used, at most: 2 · samples · (number of tensors) forward passes.
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
    importance = {
        name: probe(tensor, losses[:samples], eps, seed + i)
        for i, (name, tensor) in enumerate(tensors.items())
        if tensor.numel()
    }
    for name, value in importance.items():
        if not torch.tensor(value).isfinite():
            raise GossamerError(f"{name}: the loss beside it is NaN or infinite")
    sizes = {name: tensors[name].numel() for name in importance}
    return dict.fromkeys(tensors, sparsity) | shared(importance, sizes, sparsity, min(sparsity + margin, 1.0))


@torch.no_grad()
def probe(tensor: Tensor, losses: Losses, eps: float, seed: int) -> float:
    """Return the mean of |L(W + ε z) − L(W − ε z)| / 2ε over windows, each with a z of its own."""
    generator = torch.Generator().manual_seed(seed)
    before, total = tensor.clone(), 0.0
    try:
        for loss in losses:
            step = eps * torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.copy_(before + step)
            above = loss()
            tensor.copy_(before - step)
            total += abs(above - loss()) / (2 * eps)
    finally:
        tensor.copy_(before)
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
