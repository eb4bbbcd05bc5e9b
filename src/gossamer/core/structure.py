"""Structure: what can be removed whole from a model, and a method that says what is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.stats import Stats


@dataclass(frozen=True, eq=False)
class Group:
    """One kind of structure in one block: members that live or die whole, each with all of its rows and columns.

    Attributes:
        kind: "channels", whose member is a channel of the MLP, or "heads": a key-value head with the query heads that share it.
        block: the index of the block.
        count: how many members there are.
        size: the parameters that go with one.
        out: the matrix that reads the members, (out, count · width), a view: writing to it writes the weight.
        into: the matrices whose rows make a member, each (count, parameters of a member), to be read.
    """

    kind: str
    block: int
    count: int
    size: int
    out: Tensor
    into: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        """How many neighbouring columns of ``out`` are one member's."""
        return self.out.shape[1] // self.count

    def bare(self) -> "Group":
        """Return it without its weights, which else live as long as it does."""
        return replace(self, out=self.out.new_empty(0, self.out.shape[1]), into=())


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix in a block that a product of two may take the place of.

    Attributes:
        name: what it is called in its block.
        block: the index of the block.
        weight: (out, in), a view.
    """

    name: str
    block: int
    weight: Tensor

    @property
    def rank(self) -> int:
        """The rank that it can have at most."""
        return min(self.weight.shape)


Solve = Callable[[Group, Stats], None]

# What a step of a method is called, and what computes it: tensors by name.
Once = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]

# The mean of KL(then‖now) a token, on so many tokens of the calibration windows: (draw, tokens), windows in an order that the
# number draw says.
Divergence = Callable[[int, int], float]


@dataclass(frozen=True, eq=False)
class Step:
    """One block as calibration went through it.

    Attributes:
        block: its index.
        inputs, outputs: the hidden states before and after it, one tensor (windows, tokens, hidden) for each lane.
        stats: by kind of group, the statistics of the inputs of ``Group.out``.
    """

    block: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    stats: Mapping[str, Stats] = field(default_factory=dict)


class Budget(ABC):
    """What there is to save.

    Attributes:
        total: what the whole model costs as it is; ``sparsity`` is a fraction of it.
    """

    total: float

    @abstractmethod
    def cost(self, group: Group, left: int) -> float:
        """What a group costs once so many of its members are left; only differences mean something."""

    @abstractmethod
    def says(self, fraction: float) -> str:
        """Say in the user's words that this fraction is saved."""


@dataclass(frozen=True)
class Parameters(Budget):
    """A budget of the parameters inside the blocks."""

    total: float

    def cost(self, group: Group, left: int) -> float:
        return left * group.size

    def says(self, fraction: float) -> str:
        return f"{fraction:.4f} of the parameters in the blocks removed"


class Skeleton(ABC):
    """A model as a method of structure sees it: blocks, groups in them, and calibration that goes from block to block.

    Attributes:
        budget: what ``sparsity`` is a fraction of: parameters, or seconds for methods that are ``timed``.
        once: returns what a step, by its name, comes to: as a run before this one found it, where that was stopped later, or
            computed now. A step depends on the model, the windows, the method and how much is to go, not on measured times.
    """

    budget: Budget
    once: Once

    @property
    @abstractmethod
    def blocks(self) -> int:
        """How many blocks there are now."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many parameters there are in the blocks now."""

    @abstractmethod
    def groups(self, kind: str) -> list[Group]:
        """Return the groups of a kind, one a block.

        Raises:
            GossamerError: a block has none.
        """

    @abstractmethod
    def walk(self, *kinds: str, solve: Solve | None = None) -> Iterator[Step]:
        """Take the calibration windows from block to block; what the method ``needs`` is gathered for groups of these kinds.

        ``solve`` is handed each group with its statistics just before ``Group.out`` is used, and may write to it: the rest of
        the pass goes through what it wrote.
        """

    @abstractmethod
    def gradients(self, *kinds: str) -> Iterator[tuple[Group, Group]]:
        """Yield each group of these kinds with one that holds ∂L/∂w, float32, in the place of each of its weights.

        L is the mean next-token loss on the calibration windows, of the model as it is when this is called; the gradients of a
        group live only until the next one's. For methods that need "grad".
        """

    @abstractmethod
    def divergence(self) -> Divergence:
        """Return what measures how far the model has moved from what it says now; for methods that need "divergence"."""

    @abstractmethod
    def keep(self, group: Group, members: Tensor) -> None:
        """Leave only the members with these indices (ascending, at least one)."""

    @abstractmethod
    def drop(self, blocks: Sequence[int]) -> None:
        """Remove whole blocks."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How wide the hidden states are.

        Raises:
            GossamerError: the model cannot take them to another basis.
        """

    @abstractmethod
    def check_width(self, width: int) -> None:
        """Raise unless there is such a model with hidden states so wide.

        Raises:
            GossamerError: why there is none.
        """

    @abstractmethod
    def project(self, q: Tensor) -> None:
        """Take the hidden states to the basis Q, (width, at most as many orthonormal columns)."""

    @abstractmethod
    def linears(self) -> list[Linear]:
        """Return the matrices in the blocks; each block has the same ones.

        Raises:
            GossamerError: they differ by block, are stacked experts, or products already.
        """

    @abstractmethod
    def factor(self, linear: Linear, outer: Tensor, inner: Tensor) -> None:
        """Put the product of (out, r) and (r, in) in the place of a matrix; its bias stays."""

    @abstractmethod
    def note(self, block: int, **values: Any) -> None:
        """Say something of a block in the report."""


class Structure(ABC):
    """A method that removes structure. Subclasses are `spec` classes: the object is its own configuration.

    Attributes:
        removes: the kinds of structure that it removes: "blocks", "channels", "heads", "hidden" (directions of hidden states),
            "ranks" (of matrices, which become products).
        needs: what calibration has to bring: "states" (hidden states), "norm", "mean", "gram", "grad" (gradients of the loss),
            "divergence" (of what the model says).
        even: whether all blocks end with the same widths, which an ordinary config.json can say.
        timed: whether the budget may be one of seconds, so that a speed-up can be asked for.
    """

    removes: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]] = frozenset()
    even: ClassVar[bool] = False
    timed: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        """Remove ``sparsity`` of the parameters inside the blocks (or of the budget), as nearly as whole members allow.

        Raises:
            GossamerError: that cannot be; raised before anything is changed.
        """


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Return arccos(x·y / ‖x‖‖y‖) / π of vectors along the last dimension, in [0, 1], float64.

    >>> angle(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    return torch.arccos(cosine(x, y)) / math.pi


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return x·y / ‖x‖‖y‖ of vectors along the last dimension, in [−1, 1], float64."""
    return torch.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1, 1)


def counts(groups: Sequence[Group], share: Sequence[float], parameters: float, *, multiple: int = 1) -> list[int]:
    """Share out parameters that stay: how many members each group keeps, in multiples, as near to the total as these allow.

    Args:
        groups: where members are removed.
        share: the fraction of its members that each group should keep, in [0, 1]; scaled alike to reach the total.
        parameters: how many parameters of all groups together stay.
        multiple: every count is a multiple of this (or the group's whole count), and at least one.

    Raises:
        GossamerError: the total cannot be reached: what can is said.
    """
    whole = [group.count * group.size for group in groups]
    least = [min(multiple, group.count) for group in groups]
    lowest = sum(n * group.size for n, group in zip(least, groups, strict=True))
    if not lowest <= parameters <= sum(whole):
        raise GossamerError(
            f"of {sum(whole):,} parameters in {groups[0].kind} at most {sum(whole) - lowest:,} can go "
            f"({multiple} {groups[0].kind} stay in each block), and {round(sum(whole) - parameters):,} would have to"
        )
    kept = [min(max(s, 0.0), 1.0) for s in share]
    for _ in range(len(groups)):  # what a group that is full cannot take goes to the others
        free = [i for i, s in enumerate(kept) if 0 < s < 1]
        rest = parameters - sum(whole[i] for i, s in enumerate(kept) if s >= 1)
        now = sum(kept[i] * whole[i] for i in free)
        if not free or now <= 0 or math.isclose(now, rest):
            break
        for i in free:
            kept[i] = min(kept[i] * rest / now, 1.0)
    exact = [s * group.count / multiple for s, group in zip(kept, groups, strict=True)]
    found = [max(min(math.floor(e) * multiple, group.count), low) for e, group, low in zip(exact, groups, least, strict=True)]
    order = sorted(range(len(groups)), key=lambda i: math.floor(exact[i]) - exact[i])
    for i in order:  # the largest remainders are rounded up, until one more would be further away
        more = min(found[i] + multiple, groups[i].count) - found[i]
        missing = parameters - sum(n * group.size for n, group in zip(found, groups, strict=True))
        if more and missing >= more * groups[i].size / 2:
            found[i] += more
    return found
