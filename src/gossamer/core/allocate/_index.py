"""SAP: how much a tensor can be pruned, read off how uneven its entries are (the PQ index)."""

import math
from collections.abc import Mapping

from torch import Tensor

from gossamer.core.allocate._declared import check_finite, needs
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import check_sparsity


@needs("weights")
def sap(
    tensors: Mapping[str, Tensor],
    sparsity: float | None = None,
    *,
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> dict[str, float]:
    """SAP: prune min(γ·(1 − r/d), β) of a tensor's d entries, r from its PQ index (Diao et al., 2023, arXiv:2302.05601).

    I = 1 − d^(1/q − 1/p) · ‖w‖_p / ‖w‖_q is 0 where all entries are equally large and nears 1 where few hold everything; then
    r = d · (1 + η)^(−q/(q−p)) · (1 − I)^(pq/(q−p)) entries are needed at least. d counts entries that are not zero: called
    again on a pruned and retrained model, it goes on from there, as the paper's iterations do. The authors round r up and
    how many are pruned down; here the pattern rounds to the nearest.

    With no sparsity the method's own γ decides the total. With a sparsity S, γ is found so that the total is S, and β is raised
    to S where it is below: the index then says which tensors pay.

    Args:
        tensors: the weights.
        sparsity: fraction of zeros over all tensors, S in [0, 1); None for the method's own.
        p, q: the norms, 0 < p < q.
        eta: η, the slack of the bound: the higher, the more is pruned.
        gamma: γ, the scale of what is pruned, where no sparsity is given.
        beta: β in (0, 1), the most that is pruned of what a tensor has left.

    Raises:
        GossamerError: a hyper-parameter makes no sense, or S is less than what is zero already.

    >>> import torch
    >>> even, uneven = torch.ones(4), torch.tensor([1.0, 0.0001, 0.0001, 0.0001])
    >>> {name: round(s, 2) for name, s in sap({"even": even, "uneven": uneven}).items()}
    {'even': 0.0, 'uneven': 0.73}
    """
    if not (0 < p < q and eta > -1 and gamma >= 0 and 0 < beta < 1):
        given = f"p={p!r}, q={q!r}, eta={eta!r}, gamma={gamma!r}, beta={beta!r}"
        raise GossamerError(f"sap wants 0 < p < q, eta > -1, gamma >= 0 and 0 < beta < 1; got {given}")
    check_finite(tensors)
    live = {name: int(x.count_nonzero()) for name, x in tensors.items()}
    # the share that the index allows to prune of what is left
    spare = {name: 1 - bound(pq_index(x, p, q), p, q, eta) if live[name] else 0.0 for name, x in tensors.items()}

    def sparsities(scale: float, most: float) -> dict[str, float]:
        share = {name: min(max(scale * spare[name], 0.0), most) for name in tensors}
        return {name: 1 - live[name] * (1 - share[name]) / x.numel() if x.numel() else 0.0 for name, x in tensors.items()}

    if sparsity is None:
        return {name: min(s, math.nextafter(1, 0)) for name, s in sparsities(gamma, beta).items()}
    sparsity = check_sparsity(sparsity)
    size = sum(x.numel() for x in tensors.values())
    wanted = (1 - sparsity) * size
    if sum(live.values()) < wanted - len(tensors):
        raise GossamerError(f"sap: {1 - sum(live.values()) / size:.4g} of the weights are zero already, more than {sparsity:g}")

    def left(found: Mapping[str, float]) -> float:
        return sum((1 - found[name]) * x.numel() for name, x in tensors.items())

    most = max(beta, 1 - wanted / max(sum(live.values()), 1))
    spare = {name: max(value, 1e-6) for name, value in spare.items()}  # an even tensor pays too, once the others are at β
    low, high = 0.0, most / min(spare.values(), default=1.0)  # γ of no pruning, and of all tensors at β
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if left(sparsities(middle, most)) <= wanted else (middle, high)
    found = sparsities(high, most)
    return {name: min(found[name], math.nextafter(1, 0)) if x.numel() else sparsity for name, x in tensors.items()}


def pq_index(w: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """PQ index of the entries that are not zero: 1 − d^(1/q − 1/p)·‖w‖_p/‖w‖_q, in [0, 1), whatever the scale of w.

    >>> import torch
    >>> pq_index(torch.tensor([2.0, -2.0, 0.0])), round(pq_index(torch.tensor([9.0, 1.0])), 6)
    (0.0, 0.2)
    """
    size = w[w != 0].abs().double()
    size = size / size.max()
    # powers of means instead of norms: the same number, and d never overflows
    return max(1 - float(size.pow(p).mean() ** (1 / p) / size.pow(q).mean() ** (1 / q)), 0.0)


def bound(index: float, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> float:
    """Return r/d: the share of the entries that has to stay, (1 + η)^(−q/(q−p)) · (1 − I)^(pq/(q−p)), at most 1."""
    return float(min((1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p)), 1.0))
