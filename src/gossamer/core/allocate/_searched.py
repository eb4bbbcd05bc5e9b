"""Searched: the errors that pruning makes, measured once at a grid of sparsities, and the cheapest choice for the total."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from gossamer.core.allocate._declared import level, needs
from gossamer.core.errors import GossamerError
from gossamer.core.levels import cheapest
from gossamer.core.pattern import check_sparsity

Errors = Callable[[Sequence[float]], Mapping[str, Sequence[float]]]  # sparsities → each tensor's error at each of them
STATES = 2**17  # sizes are counted in a unit that keeps the table of the search below so many columns


@needs("errors")
def searched(tensors: Mapping[str, Tensor], sparsity: float, errors: Errors, *, steps: int = 20) -> dict[str, float]:
    """Minimise Σ_i E_i(s_i) over s_i = k/steps, exactly (the search of SPDY: Frantar and Alistarh, 2022, arXiv:2201.13096).

    E_i(s) = ‖(W_i − Ŵ_i(s)) X_i‖² / ‖W_i X_i‖² is the relative error of the tensor's output when the method itself prunes it
    to s, from the Gram matrix of its inputs in the dense model; it is measured once for each point of the grid. Dynamic
    programming over the number of zeros then finds the k_i of least total error with Σ n_i k_i/steps ≥ S·Σ n_i. What that is
    sparser than S is given back evenly, so that the total is S; beyond (steps − 1)/steps all tensors get S.

    SPDY and ZipLM (arXiv:2302.04089) weigh each E_i by a factor that they find by trying whole models; here all weigh the same,
    and it is `evolved` that tries them.

    Args:
        errors: measures each tensor's error at each of the sparsities given.
        sparsity: fraction of zeros over all tensors, S in [0, 1).
        steps: how many points the grid 0, 1/steps ... has; the method prunes every tensor once for each.

    Raises:
        GossamerError: steps is no integer above 1, or an error is NaN or infinite.

    >>> import torch
    >>> measured = {"robust": [0.0, 0.1, 0.2, 0.3], "fragile": [0.0, 0.5, 1.0, 2.0]}
    >>> searched({name: torch.empty(8, 8) for name in measured}, 0.5, lambda grid: measured, steps=4)
    {'robust': 0.75, 'fragile': 0.25}
    """
    sparsity = check_sparsity(sparsity)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise GossamerError(f"searched(steps=...) is how many points the grid has, 2 or more; got {steps!r}")
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if tensor.numel()}
    found = dict.fromkeys(tensors, sparsity)
    total = sum(sizes.values())
    if not sizes or sparsity * total * steps > (steps - 1) * total:
        return found
    table = errors([k / steps for k in range(steps)])
    for name in sizes:
        if bad := [value for value in table[name] if not math.isfinite(value)]:
            raise GossamerError(f"{name}: {len(bad)} of {steps} errors are NaN or infinite")
    units = _units(list(sizes.values()))
    least = math.ceil(sparsity * steps * sum(units) - 1e-6)
    most = (steps - 1) * sum(units)
    grid = [[unit * k for k in range(steps)] for unit in units]
    chosen = cheapest([list(table[name]) for name in sizes], grid, least, most)
    wanted = {name: k / steps for name, k in zip(sizes, chosen, strict=True)}
    if not math.isclose(sum(sizes[name] * s for name, s in wanted.items()), sparsity * total, abs_tol=1e-6):
        wanted = level(wanted, sizes, sparsity, (0.0, math.nextafter(1, 0)))
    return found | wanted


def in_steps(found: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, steps: int) -> dict[str, float]:
    """Round sparsities to k/steps, 0 < k < steps, as near as the total allows: the mixed n:m of one average.

    Minimises Σ n_i (k_i/steps − s_i)² with Σ n_i k_i/steps = S·Σ n_i exactly, by the same search.

    >>> in_steps({"a": 0.4, "b": 0.6, "c": 0.5}, {"a": 8, "b": 8, "c": 16}, 0.5, 4)
    {'a': 0.5, 'b': 0.5, 'c': 0.5}
    >>> in_steps({"a": 0.3, "b": 0.7}, {"a": 8, "b": 8}, 0.5, 4)
    {'a': 0.25, 'b': 0.75}
    """
    units = _units([sizes[name] for name in found])
    total = round(sparsity * steps) * sum(units)  # a multiple of 1/steps, so that equal k reach it: there is a solution
    apart = [
        [size * (k / steps - s) ** 2 if 0 < k < steps else math.inf for k in range(steps)]
        for size, s in zip(units, found.values(), strict=True)
    ]
    grid = [[unit * k for k in range(steps)] for unit in units]
    return {name: k / steps for name, k in zip(found, cheapest(apart, grid, total, total), strict=True)}


def _units(sizes: Sequence[int]) -> list[int]:
    """Return the sizes in their common unit, or, where that is too small for the table, in the nearest that is not."""
    unit = max(math.gcd(*sizes), -(-sum(sizes) * 32 // STATES)) if sizes else 1
    return [max(round(size / unit), 1) for size in sizes]
