"""The one import that registers something: the quantization method "gossamer" with transformers, the sparse adapters with peft.

After it, ``from_pretrained`` and ``save_pretrained`` work on what `gossamer.save(model, folder, packed=True)` wrote, and peft
makes, loads and merges adapters of the configurations that are exported here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.adapters import LoRAPruneConfig, MaskLoRAConfig, PSTConfig, ScaleLoRAConfig, SPPConfig
from gossamer.core.errors import GossamerError
from gossamer.models import PACKED
from gossamer.sites._packed import Files, Packed, Weight, checksum, stop
from gossamer.sites._packed_write import for_file, renamed, saved_state, sparse_layers
from gossamer.sites._sparse_linear import SparseLinear
from gossamer.sites._widths import Widths, cut, widths_of

__all__ = [
    "GossamerConfig",
    "GossamerQuantizer",
    "LoRAPruneConfig",
    "MaskLoRAConfig",
    "PSTConfig",
    "SPPConfig",
    "ScaleLoRAConfig",
    "mark",
    "shaped",
    "unmark",
]


@register_quantization_config(PACKED)
class GossamerConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry ``quantization_config`` of config.json where weights are packed, or blocks differ in width.

    Raises:
        GossamerError: it is no entry that `gossamer.save` wrote.
    """

    def __init__(self, **entry: Any) -> None:
        self.quant_method = PACKED
        self.packed = Packed.parse(entry)

    def to_dict(self) -> dict[str, Any]:
        return self.packed.to_json()


@register_quantizer(PACKED)
class GossamerQuantizer(HfQuantizer):  # type: ignore[misc]
    """Before weights are loaded, cuts blocks to their widths and puts an empty `SparseLinear` in each packed linear's place.

    The tensors' checksums are checked in the files, since a weight may be cast while it is loaded; the layout is checked in
    memory. Whatever is wrong is a GossamerError out of ``from_pretrained``.
    """

    requires_calibration = True  # a dense checkpoint is pruned and saved packed, not packed while it is loaded

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **others: Any
    ) -> None:
        if not checkpoint_files:
            raise GossamerError("a packed model is loaded from its files, not from a state dict")
        packed, files = self.quantization_config.packed, Files([Path(file) for file in checkpoint_files])
        packed.check(files)
        cut(model, packed.widths)
        self._weights: dict[str, Weight] = {}
        for stored, weight in packed.weights.items():
            name, linear = _linear(model, weight.module or stored)
            _check_shape(name, linear, weight, type(model).__name__)
            blank = weight.blank(files.of(stored, weight), linear.weight.dtype)
            layer = SparseLinear(blank, linear.bias, transposed=weight.transposed)
            # Until it is loaded: models initialise what they are made of by name, and skip what is marked.
            layer.register_buffer("weight", torch.empty_like(stop(), device="meta"))
            layer.weight._is_hf_initialized = True  # type: ignore[union-attr]
            model.set_submodule(name, layer)
            self._weights[name] = weight
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> None:
        for name, tensor in model.state_dict().items():  # transformers 5.17 does not look, where there is a quantizer
            if tensor.shape != self._shapes.get(name, tensor.shape):
                told = f"{tuple(tensor.shape)} in the files, and {tuple(self._shapes[name])} in {type(model).__name__}"
                raise GossamerError(f"{name} is {told}")
        if not self._weights:  # dense, only of other widths: nothing that quantization forbids is to be forbidden
            model.is_quantized = False
            for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
                config.__dict__.pop("_is_quantized", None)
        for name, weight in self._weights.items():
            layer = model.get_submodule(name)
            del layer.weight
            tensors = {tensor: getattr(layer, tensor) for tensor in weight.tensors}
            # transformers marks what it has loaded; what it has not found it fills at random, and only warns.
            if any(t.is_meta or not getattr(t, "_is_hf_initialized", False) for t in tensors.values()):
                raise GossamerError(f"the packed weight {name} was not loaded; its buffers cannot be offloaded to disk")
            try:
                whole = weight.read(tensors).tensors(derived=True)
            except GossamerError as error:
                raise GossamerError(f"{name}: {error}") from error
            for tensor in weight.layout.derived:
                setattr(layer, tensor, whole[tensor])

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Describe the model as it is now, for the config that transformers is about to write."""
        layers = sparse_layers(model)
        if not layers:  # unpacked since it was loaded, or never packed
            shaped(model, widths_of(model))
            return None, {}
        state, modules = saved_state(model), {}
        for name, layer in layers.items():
            for part in layer.packed.tensors():
                del state[f"{name}.{part}"]
            packed = for_file(layer.packed)
            state |= {f"{name}.{part}": tensor for part, tensor in packed.tensors().items()}
            state[f"{name}.weight"] = stop()
            modules[id(packed.values)] = name, Weight.of(packed, layer.transposed)
        stored = renamed(model, state)
        weights = {}
        for key, tensor in stored.items():
            if id(tensor) in modules:
                name, weight = modules[id(tensor)]
                linear = key.rpartition(".")[0]
                weights[linear] = weight if linear == name else replace(weight, module=name)
        if len(weights) < len(layers):
            raise GossamerError(f"{type(model).__name__} stores packed weights as parts of others: they cannot be saved")
        crc32 = {key: checksum(tensor) for key, tensor in stored.items()}
        self.quantization_config.packed = Packed(weights, crc32, widths_of(model))
        model.config.quantization_config = self.quantization_config
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the packed weights: gradients of the input flow through them


def mark(model: Any) -> None:
    """Let a model that was packed in memory be saved by transformers' own ``save_pretrained``."""
    model.hf_quantizer = GossamerQuantizer(GossamerConfig(**Packed({}, {}, widths_of(model)).to_json()))


def unmark(model: Any) -> None:
    """Undo `mark`, and the mark of a model that was loaded packed: it is dense again."""
    if isinstance(getattr(model, "hf_quantizer", None), GossamerQuantizer):
        shaped(model, widths_of(model))


def shaped(model: Any, widths: Widths) -> None:
    """Let a dense model's configuration list the widths of its blocks; without any, it is an ordinary model."""
    if isinstance(getattr(model, "hf_quantizer", None), GossamerQuantizer):
        model.hf_quantizer.remove_quantization_config(model)
    if widths:
        entry = GossamerConfig(**Packed({}, {}, widths).to_json())
        model.hf_quantizer, model.config.quantization_config = GossamerQuantizer(entry), entry


def _linear(model: Any, name: str) -> tuple[str, Any]:
    """Return a model's linear by the name that a checkpoint gives it, with the base model's prefix or without."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            return candidate, module
    raise GossamerError(f"the config packs {name}, which is no linear of {type(model).__name__}")


def _check_shape(name: str, linear: Any, weight: Weight, model: str) -> None:
    out, in_ = weight.shape
    asked = (in_, out) if weight.transposed else (out, in_)
    if weight.transposed != isinstance(linear, Conv1D) or linear.weight.shape != asked:
        told = f"{tuple(linear.weight.shape)} in {model}"
        raise GossamerError(f"the packed weight {name} is {asked} in its config, and {told}")
