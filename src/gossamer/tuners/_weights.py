"""The weights whose mask is learned: found and checked before anything is changed, reparametrized, and put back plain."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from gossamer.core.errors import GossamerError
from gossamer.core.tuner import How
from gossamer.sites._job import check_finite
from gossamer.sites._walk import Target
from gossamer.sites._walk import targets as find_targets


class Weight:
    """A parameter whose mask is learned, once however many modules share it, and ways to see it as matrices (out, in)."""

    def __init__(self, target: Target) -> None:
        self.name, self._target = target.name, target
        self.parameter: nn.Parameter = getattr(target.module, target.attribute)
        self._homes = [(target.module, target.attribute)]

    def also_in(self, target: Target) -> None:
        """Count in another module that holds the same parameter; the same module may stand in several places."""
        if all(module is not target.module for module, _ in self._homes):
            self._homes.append((target.module, target.attribute))

    def matrices(self, tensor: Tensor) -> Tensor:
        """View a tensor of the parameter's shape as a stack of matrices, (experts or 1, out, in)."""
        view = tensor if self._target.stacked else tensor.unsqueeze(0)
        return view.transpose(-1, -2) if self._target.transposed else view

    def stored(self, matrices: Tensor) -> Tensor:
        """View a stack of matrices in the parameter's shape: the inverse of `matrices`."""
        view = matrices.transpose(-1, -2) if self._target.transposed else matrices
        return view if self._target.stacked else view.squeeze(0)

    @torch.no_grad()
    def mask(self, how: How) -> Tensor:
        """Return the mask of the largest magnitudes that the pattern allows now, bool, of the parameter's shape."""
        assert how.pattern is not None
        chosen = [how.pattern.select(matrix.abs(), how.sparsity, name=self.name) for matrix in self.matrices(self.parameter)]
        return self.stored(torch.stack(chosen)).contiguous()

    def parametrize(self, by: nn.Module) -> None:
        """Let the modules compute with ``by(parameter)`` in place of the parameter, which stays what is trained and stored."""
        for module, attribute in self._homes:
            parametrize.register_parametrization(module, attribute, by, unsafe=True)

    @torch.no_grad()
    def finish(self, values: Tensor) -> None:
        """Take the parametrization away, and leave these values in the parameter."""
        for module, attribute in self._homes:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        self.parameter.copy_(values)


def weights_of(model: nn.Module, how: How) -> list[Weight]:
    """Return the weights that are meant.

    Raises:
        GossamerError: the pattern fits one of them not, or one is NaN, offloaded, sharded or already reparametrized.
    """
    assert how.pattern is not None
    found: dict[int, Weight] = {}
    for target in find_targets(model, how.targets):
        if parametrize.is_parametrized(target.module, target.attribute):
            raise GossamerError(f"{target.name} is reparametrized already: finish what does that first")
        if target.parameter.is_meta or hasattr(target.parameter, "to_local"):
            raise GossamerError(f"{target.name} is offloaded or sharded: a mask is learned of weights that are there whole")
        how.pattern.check(target.matrices().shape[1:], target.name)
        check_finite(target)
        found.setdefault(id(getattr(target.module, target.attribute)), Weight(target)).also_in(target)
    return list(found.values())


def plain(optimizer: Any, updates: list[nn.Parameter]) -> Optimizer:
    """Return the torch optimizer, without accelerate's wrapper, after a look at whether it updates these parameters.

    Raises:
        GossamerError: it is none, or it does not.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's wrapper has no hooks of its own
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise GossamerError(
            f"attach wants a torch.optim.Optimizer, or accelerate's around one, not a {type(optimizer).__name__}"
        )
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := sum(id(parameter) not in updated for parameter in updates):
        raise GossamerError(
            f"the optimizer does not update {missing} of {len(updates)} tensors: make it of tuning.parameters()"
        )
    return optimizer


def scaled(optimizer: Optimizer) -> bool:
    """Tell whether gradients are still multiplied by a GradScaler's factor, which fused optimizers divide out themselves."""
    return getattr(optimizer, "grad_scale", None) is not None


@torch.no_grad()
def restore(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Copy a state into tensors of the same names and shapes; nothing is copied where they differ."""
    if differing := sorted(set(tensors) ^ set(state)):
        raise GossamerError(f"this state is of another tuning: {differing[0]} is in one and not in the other")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            found, held = tuple(state[name].shape), tuple(tensor.shape)
            raise GossamerError(f"this state is of another tuning: {name} has shape {held}, there {found}")
    for name, tensor in tensors.items():
        tensor.copy_(state[name])


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that can be trained at all."""
    return (parameter for parameter in model.parameters() if parameter.is_floating_point())
