"""Týr-the-Pruner: every layer pruned to several levels, and an evolution that trades levels between layers."""

import random
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.evolution import check_stages, evolve, swapped
from gossamer.core.spec import spec
from gossamer.core.stats import Stats
from gossamer.core.structure import Divergence, Group, Skeleton, Structure, counts
from gossamer.core.surgeon import Removal, refit, remove
from gossamer.core.variants import Variants

DENSE = 0  # the number under which a whole weight is kept: no variant has none left


@spec
class Tyr(Structure):
    """Search n_l of Ŵ_l = (W H)_:,K (H_KK)⁻¹, |K| = n_l, by KL(dense‖pruned) at one total (Li et al., 2025, arXiv:2503.09657).

    W is what reads the structures of a layer, its attention or its MLP; K what the structured brain surgeon leaves of their
    columns (as in `ZipLM`), H the damped Gram matrix of its inputs. Each round prunes every layer to 2·``levels`` + 1 numbers
    around the one it has, evenly apart; a layer sees what comes out of those before it, pruned to theirs. Then evolution: a
    child is its parent with one to four swaps, each a level more for a layer and one less for another of the same kind and
    size, so that the total stays; children are thinned out by KL on more and more tokens, the parent is there at the last,
    and what is left is the next parent. The next round's numbers stand half as far apart around it.

    Args:
        rounds: of pruning and search; 4 in the paper.
        levels: how many on either side; 4 in the paper.
        interval: how far the first round's numbers are apart, a fraction of a layer's members; 1/8 in the paper.
        generations, offspring: in each round; 50 and 128 in the paper.
        survivors, tokens: how many are left of the offspring after each stage, and on how many tokens of the calibration
            windows they are measured in it; (16, 4, 1) and (2048, 16384, 131072) in the paper.
        damp: what is added to H's diagonal, as a fraction of its mean.
        multiple: channels are counted in multiples of this.
        seed: of the search.

    Variants are on disk meanwhile, in a temporary directory: as much as W of all layers times their number, in float32. In
    memory there is the model, one block's statistics, and the hidden states that the dense model ended in.

    The paper lets the next layer see the mean of all variants; here, as in its code, the one in the middle. Its code scores
    structures with Σ W_S ⊙ (H W)_S besides, and removes many at once; here it is one at a time, by what its loss costs. A
    head is a key-value head with the query heads that share it.

    >>> Tyr(rounds=2, offspring=8)
    Tyr(rounds=2, offspring=8)
    """

    rounds: int = 3
    levels: int = 4
    interval: float = 0.125
    generations: int = 10
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 1)
    tokens: tuple[int, ...] = (512, 4096)
    damp: float = 0.01
    multiple: int = 8
    seed: int = 0
    removes: ClassVar[frozenset[str]] = frozenset({"channels", "heads"})
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "divergence"})

    def __post_init__(self) -> None:
        numbers = self.rounds, self.levels, self.generations, self.offspring, self.multiple
        check_stages(self.survivors, self.tokens, numbers, repr(self))
        if not self.damp > 0 or not 0 < self.interval < 1:
            raise GossamerError(f"Tyr wants damp > 0 and interval in (0, 1); got {self.damp!r} and {self.interval!r}")

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        kept = self._even(model, sparsity)
        measure, chance = model.divergence(), random.Random(self.seed)
        with Variants() as variants:
            try:
                for at in range(self.rounds):
                    choices = [self._choices(group, n, at) for group, n in zip(_groups(model), kept, strict=True)]
                    net = _Net(_groups(model), variants, kept, choices)

                    def search(net: "_Net" = net, at: int = at) -> dict[str, Tensor]:
                        self._supernet(model, net, at)
                        return self._search(net, measure, chance)

                    told = model.once(f"round-{at}", search)
                    kept = told["kept"].tolist()
                    chance.setstate((3, tuple(told["chance"].tolist()), None))
                if not net.found:  # a run before came as far as this
                    self._supernet(model, net, at)
                net.take(kept)
            except BaseException:  # the model is as it was: no member is gone yet, and its weights are all there
                for group in _groups(model):
                    if variants.has(_key(group), DENSE):
                        group.out.copy_(variants.get(_key(group), DENSE))
                raise
            model.note(0, divergence=float(told["divergence"]))
            for group, n in zip(net.groups, kept, strict=True):
                model.keep(group, net.found[_key(group)].kept(group.count - n, group.count))

    def _even(self, model: Skeleton, sparsity: float) -> list[int]:
        """Return how many members each group keeps, all alike as nearly as the total allows.

        Raises:
            GossamerError: there is no such total.
        """
        heads, channels = model.groups("heads"), model.groups("channels")
        whole = [sum(group.count * group.size for group in kind) for kind in (heads, channels)]
        share = 1 - sparsity * model.parameters / sum(whole)
        if share <= 0:
            most = sum(whole) / model.parameters
            raise GossamerError(
                f"{self} can remove less than {most:.4f} of the parameters in the blocks; {sparsity} was asked for"
            )
        least = sum(group.size for group in heads)
        left = counts(heads, [share] * len(heads), max(share * whole[0], least))
        taken = sum(n * group.size for n, group in zip(left, heads, strict=True))
        return left + counts(channels, [share] * len(channels), share * sum(whole) - taken, multiple=self.multiple)

    def _choices(self, group: Group, kept: int, at: int) -> list[int]:
        """Return the numbers that a group may keep in round ``at``: ascending, evenly apart, the present one among them."""
        unit = min(self.multiple, group.count) if group.kind == "channels" else 1
        apart = max(round(self.interval / 2**at * group.count / unit), 1) * unit
        around = {kept // unit * unit + level * apart for level in range(-self.levels, self.levels + 1)} | {kept}
        return sorted(n for n in around if unit <= n <= group.count)

    def _supernet(self, model: Skeleton, net: "_Net", at: int) -> None:
        """Prune every layer to each of its numbers, and note the orders in which members go. Leaves the net's numbers."""
        wanted = {_key(g): pair for g, pair in zip(net.groups, zip(net.now, net.choices, strict=True), strict=True)}

        def prune(group: Group, stats: Stats) -> None:
            key = _key(group)
            present, numbers = wanted[key]
            if not net.variants.has(key, DENSE):
                net.variants.put(key, DENSE, group.out)
            w = net.variants.get(key, DENSE).to(group.out.device)

            def apart() -> dict[str, Tensor]:
                upper, dead, _ = stats.inverse_factor(self.damp)
                going, _, _ = remove(w.masked_fill(dead, 0), upper.T @ upper, group.width, group.count - numbers[0])
                return {"order": going.order, "errors": going.errors}

            net.found[key] = Removal(**model.once(f"round-{at}-{key}", apart))
            _, _, damp = stats.inverse_factor(self.damp)
            h = stats.hessian(damp)
            for n in numbers:
                columns = _columns(group, net.found[key], n)
                net.variants.put(key, n, refit(w, h, columns)[:, columns] if n < group.count else w)
            _write(group, net.found[key], present, net.variants)

        for _ in model.walk("heads", "channels", solve=prune):
            pass

    def _search(self, net: "_Net", measure: Divergence, chance: random.Random) -> dict[str, Tensor]:
        """Return the numbers that evolution ends with, their KL on the last stage's tokens, and where chance stands then."""
        alike = [(group.kind, group.size) for group in net.groups]
        kept, apart = evolve(
            list(net.now),
            lambda parent: swapped(alike, net.choices, parent, chance),
            net.take,
            measure,
            chance,
            generations=self.generations,
            offspring=self.offspring,
            survivors=self.survivors,
            tokens=self.tokens,
        )
        divergence = torch.tensor(apart, dtype=torch.float64)
        return {"kept": torch.tensor(kept), "divergence": divergence, "chance": torch.tensor(chance.getstate()[1])}


class _Net:
    """The model with one variant of each layer in it, of those that it may have; ``now`` says which."""

    def __init__(self, groups: list[Group], variants: Variants, now: list[int], choices: list[list[int]]) -> None:
        self.groups, self.variants, self.now, self.choices = groups, variants, list(now), choices
        self.found: dict[str, Removal] = {}

    def take(self, kept: list[int]) -> None:
        """Put other variants in where they differ."""
        for place, (group, n) in enumerate(zip(self.groups, kept, strict=True)):
            if n != self.now[place]:
                _write(group, self.found[_key(group)], n, self.variants)
        self.now = list(kept)


def _write(group: Group, removal: Removal, n: int, variants: Variants) -> None:
    group.out.zero_()
    group.out[:, _columns(group, removal, n)] = variants.get(_key(group), n).to(group.out)


def _columns(group: Group, removal: Removal, n: int) -> Tensor:
    """Return the columns of the n members that are left."""
    members = removal.kept(group.count - n, group.count).to(group.out.device)
    return (members[:, None] * group.width + torch.arange(group.width, device=members.device)).flatten()


def _groups(model: Skeleton) -> list[Group]:
    return [group for kind in ("heads", "channels") for group in model.groups(kind)]


def _key(group: Group) -> str:
    return f"{group.kind}-{group.block}"
