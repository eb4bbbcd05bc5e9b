"""ZipLM: the brain surgeon orders what each layer can lose, and one budget says how much of it goes where."""

from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.levels import within
from gossamer.core.spec import spec
from gossamer.core.stats import Stats
from gossamer.core.structure import Group, Skeleton, Structure
from gossamer.core.surgeon import Removal, refit, remove


@spec
class ZipLM(Structure):
    """Drop S of least Σ_i W_i,S ((H⁻¹)_SS)⁻¹ W_i,Sᵀ, W −= W_:,S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S,: (Kurtic et al., 2023, arXiv:2302.04089).

    W is what reads the structures, of attention and of the MLP, S the columns of one head group or channel, H = X Xᵀ +
    λ·mean(diag)·I of its inputs. On the dense model every layer is taken apart one structure after another, which gives an
    order, and the error ‖(W − Ŵ)X‖² / ‖WX‖² of every number that may be gone. Dynamic programming picks the numbers: the least
    sum of errors within the parameters that are to stay, or within the time (``speedup``), by a table of what each number takes
    on this device. Then, block by block, what is left of W is fitted in closed form,
    (W H)_:,K (H_KK)⁻¹, with H of what comes out of the blocks already shrunk.

    Args:
        damp: λ, as a fraction of H's mean diagonal.
        multiple: channels are counted in multiples of this.

    The paper weighs each layer's error by a coefficient that it searches for with the loss; here every one is 1. It removes
    query heads one by one, and whole modules; here a key-value head goes with those that share it, and one stays. An input that
    is always zero goes first, at no cost.

    >>> ZipLM(damp=0.1)
    ZipLM(damp=0.1)
    """

    damp: float = 0.01
    multiple: int = 8
    removes: ClassVar[frozenset[str]] = frozenset({"channels", "heads"})
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    timed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damp > 0 or self.multiple < 1:
            raise GossamerError(f"ZipLM wants damp > 0 and multiple >= 1; got damp={self.damp!r}, multiple={self.multiple!r}")

    @torch.no_grad()
    def __call__(self, model: Skeleton, sparsity: float) -> None:
        groups = [group.bare() for kind in ("heads", "channels") for group in model.groups(kind)]
        levels = [self._levels(group) for group in groups]
        budget = model.budget
        sizes = [[budget.cost(group, group.count - n) for n in own] for group, own in zip(groups, levels, strict=True)]
        least, whole = (sum(f(own) for own in sizes) for f in (min, max))
        stay = whole - sparsity * budget.total
        if stay < least:
            most = budget.says((whole - least) / budget.total)
            raise GossamerError(f"{self} ends at {most}; {budget.says(sparsity)} was asked for")

        found: dict[tuple[str, int], Removal] = {}
        energy: dict[tuple[str, int], float] = {}

        def take_apart(group: Group, stats: Stats) -> None:
            def apart() -> dict[str, Tensor]:
                w = group.out.float()
                upper, dead, damp = stats.inverse_factor(self.damp)
                going, _, _ = remove(w.masked_fill(dead, 0), upper.T @ upper, group.width, max(self._levels(group)))
                return {"order": going.order, "errors": going.errors, "energy": (w @ stats.hessian(damp) * w).sum()}

            told = model.once(f"{group.kind}-{group.block}", apart)
            key = group.kind, group.block
            found[key], energy[key] = Removal(told["order"], told["errors"]), float(told["energy"])

        for _ in model.walk("heads", "channels", solve=take_apart):
            pass
        keys = [(group.kind, group.block) for group in groups]
        costs = [[float(found[k].errors[n]) / (energy[k] or 1.0) for n in own] for k, own in zip(keys, levels, strict=True)]
        picked = within(costs, sizes, stay)
        gone = {key: own[level] for key, own, level in zip(keys, levels, picked, strict=True)}
        for key, cost, level in zip(keys, costs, picked, strict=True):
            model.note(key[1], **{f"{key[0]}_error": cost[level]})

        def repair(group: Group, stats: Stats) -> None:
            if n := gone[group.kind, group.block]:
                members = found[group.kind, group.block].kept(n, group.count).to(group.out.device)
                columns = (members[:, None] * group.width + torch.arange(group.width, device=members.device)).flatten()
                _, _, damp = stats.inverse_factor(self.damp)  # raised where H is not positive definite otherwise
                group.out.copy_(refit(group.out.float(), stats.hessian(damp), columns))

        for step in model.walk("heads", "channels", solve=repair):
            for group in groups:
                key = (group.kind, group.block)
                if group.block == step.block and gone[key]:
                    model.keep(group, found[key].kept(gone[key], group.count))

    def _levels(self, group: Group) -> list[int]:
        """Return how many members may be gone: with what stays a multiple, and at least one of it."""
        unit = min(self.multiple, group.count) if group.kind == "channels" else 1
        return [0, *(n for n in range(1, group.count) if (group.count - n) % unit == 0)]
