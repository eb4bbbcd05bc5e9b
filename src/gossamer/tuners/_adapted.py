"""What the tuners that train an adapter share: peft holds it, and merging ends it."""

import warnings
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.core.tuner import How, Tuning
from gossamer.sites._walk import targets


def adapted(model: nn.Module, config: str, how: How, **settings: Any) -> "Adapted":
    """Put an adapter into a model: the name of its configuration in `gossamer.hf`, and what that takes."""
    from gossamer import hf  # peft and transformers are loaded only where an adapter is made

    return Adapted(model, getattr(hf, config)(target_modules=modules_of(model, how.targets), **settings))


def modules_of(model: nn.Module, expression: str | None) -> list[str] | None:
    """Return the names of the linears that ``targets=`` names; None leaves them to the adapter."""
    if expression is None:
        return None
    return [target.name.removesuffix(".weight") for target in targets(model, expression) if not target.stacked]


class Adapted(Tuning):
    """A model with an adapter in training: ``model`` is peft's, whose ``save_pretrained`` saves the adapter alone."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        from peft import get_peft_model

        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with warnings.catch_warnings():  # peft asks transformers for an attribute by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self._peft: Any = get_peft_model(model, config)
        self.model = self._peft
        self._following: RemovableHandle | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def attach(self, optimizer: Optimizer) -> Self:
        self._unfollow()
        self._following = self._peft.base_model.follow(optimizer)
        return self

    def finish(self) -> nn.Module:
        tuner = self._peft.base_model
        held = [(layer.name, layer, layer.adapters(layer.active_adapters)[0]) for layer in tuner.layers]
        self._unfollow()
        plain: nn.Module = self._peft.merge_and_unload()
        self.model = plain
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)
        for name, layer, adapter in held:
            zeroed = tuner.merges[name]["zeroed"]
            if adapter.keeps and int(layer.w.count_nonzero()) != int(adapter.mask[0]) - zeroed:
                raise GossamerError(f"{name} lost zeros in merging")
        return plain

    def _unfollow(self) -> None:
        if self._following is not None:
            self._following.remove()

    def state_dict(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._peft, dict(state))
