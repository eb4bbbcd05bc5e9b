"""Full: every kept weight is trained, and so is everything else."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.sites.holding import Hold, hold


@spec
class Full(Tuner):
    """Train all parameters, the zeros of the pruned weights held: W ← (W − η·step(g ⊙ M)) ⊙ M.

    Of a dense model that was shrunk there are none to hold, and M is all ones. The yardstick of the parameter-efficient
    methods, and the one with the most memory: see `gossamer.hold`.

    >>> Full()
    Full
    """

    def start(self, model: nn.Module, how: How) -> Tuning:
        return _Full(model, how.targets, how.whole)


class _Full(Tuning):
    def __init__(self, model: nn.Module, targets: str | None, whole: bool) -> None:
        self.model, self._targets, self._whole = model, targets, whole
        self._frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_()
        self._hold: Hold | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def attach(self, optimizer: Optimizer) -> Self:
        if not self._whole:
            self._hold = hold(self.model, optimizer, targets=self._targets)
        return self

    def finish(self) -> nn.Module:
        if held := self._attached():
            held.release()
            held.check()
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        weights = {f"weight.{name}": p.detach() for name, p in self.model.named_parameters()}
        if not (holding := self._attached()):
            return weights
        held = holding.state_dict()
        masks = {f"mask.{name}": mask for name, mask in held["masks"].items()}
        return {"steps": torch.tensor(held["steps"]), **masks, **weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"weight.{name}"])
        if held := self._attached():
            masks = {name.removeprefix("mask."): mask for name, mask in state.items() if name.startswith("mask.")}
            held.load_state_dict({"steps": int(state["steps"]), "masks": masks})

    def _attached(self) -> Hold | None:
        """Return what holds the zeros; nothing where there are none to hold."""
        if self._hold is None and not self._whole:
            raise GossamerError("attach the optimizer first: tuning.attach(optimizer)")
        return self._hold
