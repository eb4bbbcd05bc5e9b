"""OQP: the integers of a weight on a grid stay, and the grid is trained."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from gossamer.core.errors import GossamerError
from gossamer.core.grid import found, held, moved, tiles, untiled
from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.sites._job import check_finite
from gossamer.sites._walk import Target
from gossamer.sites._walk import targets as find_targets
from gossamer.tuners._weights import Weight, plain, restore


@spec
class OQP(Tuner):
    """Train s and z in W' = s·(q − z), q and all else frozen (E2E-OQP of GQSA: Zeng et al., 2024, arXiv:2412.17560).

    Every group of ``group`` inputs has a scale s and a zero z; those of kept groups are all that is trained. z stays a whole
    number, its gradient straight through the rounding. s is trained by its logarithm and z as a share of the grid's length, so
    that one rate is meant for both; the paper trains them as they are.

    It is for weights that lie on grids: pruned by `GQSA` with the pattern ``1x<group>``, or reconstructed with bits and group.

    Args:
        bits: of q, 2 to 4.
        group: how many inputs share a grid.

    >>> OQP(group=32)
    OQP(group=32)
    """

    bits: int = 4
    group: int = 16
    rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if not type(self.bits) is type(self.group) is int or self.bits not in (2, 3, 4) or self.group < 1:
            raise GossamerError(f"OQP wants bits of 2, 3 or 4 and group >= 1; got bits={self.bits!r}, group={self.group!r}")

    def start(self, model: nn.Module, how: How) -> Tuning:
        return _OQP(model, how, self)


class _OQP(Tuning):
    def __init__(self, model: nn.Module, how: How, method: OQP) -> None:
        self.model = model
        weights: dict[int, Weight] = {}
        grids: dict[int, _Grids] = {}
        for target in find_targets(model, how.targets):
            key = id(getattr(target.module, target.attribute))
            if key in weights:
                weights[key].also_in(target)
            elif (grid := _grids_of(target, method)) is not None:
                weights[key], grids[key] = Weight(target), grid
        if not weights:
            raise GossamerError("no weight has groups of zeros: prune the model first, by GQSA")
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        self._layers = {weight: grids[key] for key, weight in weights.items()}
        for weight, grid in self._layers.items():
            weight.parametrize(grid)

    def parameters(self) -> list[nn.Parameter]:
        return [leaf for grid in self._layers.values() for leaf in (grid.grown, grid.shifted)]

    def attach(self, optimizer: Optimizer) -> Self:
        plain(optimizer, self.parameters())
        return self

    def finish(self) -> nn.Module:
        for weight, grid in self._layers.items():
            weight.finish(grid(weight.parameter))
        self._layers = {}
        for parameter in self._trained:
            parameter.requires_grad_()
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        restore(self._tensors(), state)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{weight.name}": getattr(grid, kind).detach()
            for weight, grid in self._layers.items()
            for kind in ("grown", "shifted")
        }


class _Grids(nn.Module):
    """The kept groups of a weight: their integers, their grids as they began, and how far these have moved."""

    where: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, target: Target, bits: int, dtype: torch.dtype, where: Tensor, codes: Tensor, scale: Tensor, zero: Tensor
    ) -> None:
        super().__init__()
        self._target, self._bits, self._dtype = target, bits, dtype
        for name, tensor in (("where", where), ("codes", codes), ("scale", scale[:, None]), ("zero", zero[:, None])):
            self.register_buffer(name, tensor, persistent=False)
        self.grown = nn.Parameter(torch.zeros_like(self.scale))
        self.shifted = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self, w: Tensor) -> Tensor:
        scale, zero = moved(self.scale, self.zero, self.grown, self.shifted, self._bits, self._dtype)
        own = scale * (self.codes - zero)
        every = own.new_zeros(*self.where.shape, own.shape[-1]).masked_scatter(self.where[..., None], own)
        matrices = untiled(every, 1, own.shape[-1])
        view = matrices.transpose(-1, -2) if self._target.transposed else matrices
        return (view if self._target.stacked else view.squeeze(0)).to(w.dtype)


def _grids_of(target: Target, method: OQP) -> _Grids | None:
    """Return the grids on which a weight lies; None for one that is neither pruned nor on any.

    Raises:
        GossamerError: it is NaN, offloaded, sharded or reparametrized, groups do not divide it, or it lies on no grids.
    """
    if parametrize.is_parametrized(target.module, target.attribute):
        raise GossamerError(f"{target.name} is reparametrized already: finish what does that first")
    if target.parameter.is_meta or hasattr(target.parameter, "to_local"):
        raise GossamerError(f"{target.name} is offloaded or sharded: grids are trained of weights that are there whole")
    check_finite(target)
    mask = target.kept(method.group)
    if not bool(mask.any()):
        return None
    every = tiles(target.matrices(), 1, method.group)
    where = (every != 0).any(-1)
    values = every[where]
    dtype = held(values)
    codes, scale, zero, on = found(values.to(dtype), method.bits)
    if off := int((~on).count_nonzero()):
        if bool(mask.all()):
            return None
        raise GossamerError(
            f"{target.name}: {off} of {len(on)} groups are on no grid of {method.bits} bits: prune the model by GQSA with the "
            f"pattern 1x{method.group}, or reconstruct it with bits={method.bits} and group={method.group}, first"
        )
    return _Grids(target, method.bits, dtype, where, codes, scale.float(), zero.float())
