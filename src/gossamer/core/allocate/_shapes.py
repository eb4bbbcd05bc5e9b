"""Allocations that read shapes alone: the same for all, by the shape, or as the user says."""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from gossamer.core.allocate._declared import needs
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import check_sparsity, kept
from gossamer.core.spec import spec


@needs()
def uniform(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """s_i = S for every tensor.

    >>> import torch
    >>> uniform({"a": torch.empty(2, 2), "b": torch.empty(4, 4)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    sparsity = check_sparsity(sparsity)
    return dict.fromkeys(tensors, sparsity)


@needs()
def erk(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Erdős–Rényi-Kernel: 1 − s_i = ε · Σ dims / Π dims (Evci et al., 2020, RigL, arXiv:1911.11134).

    Small and narrow tensors stay denser. ε makes the total right; a tensor it would give more than all its entries is dense,
    and ε is found again for the rest. A tensor of three dimensions is a stack of matrices: the dims are those of one.

    >>> import torch
    >>> found = erk({"small": torch.empty(2, 2), "large": torch.empty(8, 8)}, 0.75)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'small': 0.15, 'large': 0.7875}
    """
    sparsity = check_sparsity(sparsity)
    raw = {}
    for name, tensor in tensors.items():
        dims = tensor.shape[1:] if tensor.ndim == 3 else tensor.shape
        raw[name] = sum(dims) / max(math.prod(dims), 1)
    sparse = {name: tensor.numel() for name, tensor in tensors.items() if tensor.numel()}
    budget = (1 - sparsity) * sum(sparse.values())
    found = dict.fromkeys(tensors, 0.0)
    while sparse:
        scale = budget / sum(raw[name] * size for name, size in sparse.items())
        full = [name for name in sparse if scale * raw[name] > 1]
        if not full:
            return found | {name: 1 - scale * raw[name] for name in sparse}
        budget -= sum(sparse.pop(name) for name in full)
    return found


@spec
class mapping:
    """The user's own sparsities: s_i = given[name], or that of the first glob pattern that matches the name.

    An exact name goes before every pattern. The total is what the values make it: leave the sparsity out (None), or give the
    total they come to (to within one entry for each tensor); any other is an error.

    Raises:
        GossamerError: a value outside [0, 1), a key that matches no tensor, a tensor that no key matches, or another total.

    >>> import torch
    >>> tensors = {"layers.0.q": torch.empty(2, 2), "layers.0.k": torch.empty(2, 2)}
    >>> mapping({"*": 0.5, "layers.0.k": 0.25})(tensors)
    {'layers.0.q': 0.5, 'layers.0.k': 0.25}
    """

    given: Mapping[str, float]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.given, Mapping):
            raise GossamerError(f"mapping(given) is a sparsity for each name, such as {{'*.q_proj': 0.5}}; got {self.given!r}")
        object.__setattr__(self, "given", {str(name): check_sparsity(value) for name, value in self.given.items()})

    def __call__(self, tensors: Mapping[str, Tensor], sparsity: float | None = None) -> dict[str, float]:
        for key in self.given:
            if not any(name == key or fnmatchcase(name, key) for name in tensors):
                near = get_close_matches(key, list(tensors), n=3, cutoff=0.0)
                raise GossamerError(f"mapping: {key!r} matches no tensor; the nearest names are {', '.join(near) or '(none)'}")
        found = {}
        for name in tensors:
            keys = [key for key in self.given if key == name] or [key for key in self.given if fnmatchcase(name, key)]
            if not keys:
                near = get_close_matches(name, list(self.given), n=3, cutoff=0.0)
                raise GossamerError(f"mapping: no sparsity for {name!r}; the nearest keys are {', '.join(near) or '(none)'}")
            found[name] = self.given[keys[0]]
        if sparsity is not None:
            size = sum(tensor.numel() for tensor in tensors.values())
            total = sum(kept(s, tensors[name].numel()) for name, s in found.items())
            if abs(total - (1 - check_sparsity(sparsity)) * size) > len(tensors):
                raise GossamerError(
                    f"mapping: the sparsities given come to {1 - total / size:g} in total, which contradicts {sparsity:g}; "
                    "leave the sparsity out"
                )
        return found
