"""The peft model whose linears keep their zeros: one class for all methods."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from gossamer.adapters._config import SparseConfig
from gossamer.adapters._layer import SparseLayer, other_zeros
from gossamer.core.errors import GossamerError
from gossamer.sites._walk import targets


class SparseTuner(BaseTuner):  # type: ignore[misc]
    """Puts a `SparseLayer` around each targeted linear, and checks the zeros before anything is loaded or merged."""

    prefix = "gossamer_"
    tuner_layer_cls = SparseLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's own attribute): every linear with zeros, not a list

    def _pre_injection_hook(self, model: nn.Module, config: SparseConfig, adapter_name: str) -> None:
        self.merges: dict[str, dict[str, float]] = {}

    @property
    def layers(self) -> list[SparseLayer]:
        """The layers around linears, in the order of the model."""
        return [module for module in self.model.modules() if isinstance(module, SparseLayer)]

    # Making adapters

    def _prepare_adapter_config(self, config: SparseConfig, model_config: dict[str, Any]) -> SparseConfig:
        if config.target_modules is None:
            chosen = [target for target in targets(self.model) if not target.stacked]
            fit = [t for t in chosen if not config.adapter.keeps or not bool(t.parameter.all())]
            if not fit:
                raise _no_zeros(config, len(chosen))
            config.target_modules = [t.name.removesuffix(".weight").removesuffix(".base_layer") for t in fit]
        return config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            made = [layer for layer in self.layers if adapter_name in layer.gossamer_adapter]
            if config.adapter.keeps and all(
                layer.w.numel() == int(layer.adapters([adapter_name])[0].mask[0]) for layer in made
            ):
                raise _no_zeros(config, len(made))
        except Exception:
            self._withdraw(adapter_name)
            for parameter, trains in trained:
                parameter.requires_grad_(trains)
            raise

    def _create_and_replace(
        self, config: SparseConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        layer: Any = target  # in the end, the layer around the target
        if not isinstance(target, SparseLayer | nn.Linear | Conv1D) or not layer.weight.is_floating_point():
            raise GossamerError(f"{current_key} is a {type(target).__name__}: {config.method.value} adapts Linear and Conv1D")
        if not isinstance(target, SparseLayer):
            layer = SparseLayer(target, current_key, self.merges).train(target.training)
        try:
            layer.gossamer_adapter[adapter_name] = config.adapter(config, layer.w)
        except GossamerError as error:
            raise GossamerError(f"{current_key}: {error}") from None
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters)

    def _withdraw(self, adapter_name: str) -> None:
        """Undo an adapter that was refused."""
        for name, layer in [(n, m) for n, m in self.model.named_modules() if isinstance(m, SparseLayer)]:
            if adapter_name in layer.gossamer_adapter:
                del layer.gossamer_adapter[adapter_name]
            if not layer.gossamer_adapter:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.base_layer)
        self.peft_config.pop(adapter_name, None)
        if not self.layers and hasattr(self.model, "peft_config"):
            del self.model.peft_config

    # Loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SparseLayer) and adapter_name in m.gossamer_adapter]
        changed = []
        for name, layer in layers:
            saved = state.get(f"{name}.gossamer_adapter.{adapter_name}.mask")
            (adapter,) = layer.adapters([adapter_name])
            if saved is not None and not torch.equal(saved.cpu(), adapter.mask.cpu()):
                changed.append(layer.name)
        if changed:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, cls) and config.inference_mode:  # made in order to be loaded, just now
                tuner._withdraw(adapter_name)
            raise other_zeros(changed)
        return state

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.check_zeros(adapter_names)
        self.merges.clear()
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self._say()

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        if merge:
            self.check_zeros(adapter_names)
        self.merges.clear()
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._say()
        return model

    def check_zeros(self, names: Sequence[str] | None = None) -> None:
        """Raise GossamerError if a base has other zeros than those that an adapter was made on."""
        changed = [layer.name for layer in self.layers if layer.is_changed(layer.active_adapters if names is None else names)]
        if changed:
            raise other_zeros(changed)

    def _say(self) -> None:
        """Say, once, what merging rounded away and what it dropped."""
        zeroed = {name: int(record["zeroed"]) for name, record in self.merges.items() if record["zeroed"]}
        dropped = {name: record["dropped"] for name, record in self.merges.items() if record["dropped"]}
        if zeroed:
            most = max(zeroed, key=lambda name: zeroed[name])
            warnings.warn(
                f"merging rounded {sum(zeroed.values()):,} kept weights to zero, most of them in {most} ({zeroed[most]:,}): "
                "the model is that much sparser, which a merge in float32 would not make it",
                stacklevel=3,
            )
        if dropped:
            most = max(dropped, key=lambda name: dropped[name])
            warnings.warn(
                f"merging dropped what the update put where weights are zero, up to {dropped[most]:.0%} of its norm "
                f"(in {most}): the model is not the one that was trained; gossamer.merge says what that costs",
                stacklevel=3,
            )

    # Schedules

    def follow(self, optimizer: Optimizer) -> RemovableHandle:
        """Count an optimizer's steps, for adapters with a schedule; the handle ends it."""

        def count(*_: Any) -> None:
            for layer in self.layers:
                for adapter in layer.adapters(layer.active_adapters):
                    adapter.advance()

        return optimizer.register_step_post_hook(count)


def _no_zeros(config: SparseConfig, count: int) -> GossamerError:
    return GossamerError(
        f"none of the {count} weights has zeros for {config.method.value} to keep: prune the model first, with gossamer.prune; "
        "a dense model takes an ordinary LoRA, peft.LoraConfig"
    )
