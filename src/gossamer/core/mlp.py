"""MLP: the two layers of an MLP and the tokens that come to it, as a method that solves them together is given them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gossamer.core.stats import Stats

Activation = Callable[[Tensor], Tensor]
Prune = Callable[[Tensor, Stats], Tensor]


@dataclass(frozen=True, eq=False)
class MLP:
    """y = W₂ p + b₂ with p = φ(z), z = W₁ x + b₁; gated, W₁ x + b₁ is (s, z), one after the other, and p = φ(s)·z.

    Everything is float32; tokens are rows.

    Attributes:
        first, second: W₁, (channels, in), or (2·channels, in) where gated, and W₂, (out, channels), as they are before pruning.
        first_bias, second_bias: b₁ and b₂; zeros where there is none.
        act: φ, entry by entry.
        gated: whether one half of the first layer gates the other.
        x: the tokens that come to it, (tokens, in), a tensor a lane, in the model's dtype.
        stats: of x, with its Gram matrix.
        prune_first, prune_second: return a weight in the place of W₁ or of W₂ as the job wants it pruned, given the statistics
            of its input: under the pattern, at its own sparsity, by the method's own way with a single weight.
        notes: what the method has to say of the result, for W₂'s row in the report.
    """

    first: Tensor
    second: Tensor
    first_bias: Tensor
    second_bias: Tensor
    act: Activation
    gated: bool
    x: tuple[Tensor, ...]
    stats: Stats
    prune_first: Prune
    prune_second: Prune
    notes: dict[str, Any] = field(default_factory=dict)

    def made(self, first: Tensor, x: Tensor) -> Tensor:
        """Return what a first layer makes of tokens: z, or s and z side by side."""
        return torch.addmm(self.first_bias, x.float(), first.T)

    def inner(self, made: Tensor) -> Tensor:
        """Return p of that."""
        return between(self.act, made, self.gated)

    def out(self, second: Tensor, p: Tensor) -> Tensor:
        """Return what a second layer puts out."""
        return torch.addmm(self.second_bias, p, second.T)


def between(act: Activation, made: Tensor, gated: bool) -> Tensor:
    """Return what goes into the second layer, of what the first one makes."""
    if not gated:
        return act(made)
    s, z = made.chunk(2, dim=-1)
    return act(s) * z


@runtime_checkable
class SolvesMLP(Protocol):
    """A `Solver` that also solves the linears of an MLP together; alone, it sees the weights that are in none."""

    def mlp(self, mlp: MLP) -> tuple[Tensor, Tensor]:
        """Return Ŵ₁ and Ŵ₂, each as ``prune_first`` and ``prune_second`` gave it."""
        ...
