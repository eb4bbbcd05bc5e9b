"""Packed checkpoints, written: a model packed while it is saved, and a packed directory made dense again."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core.atomic import write_text
from gossamer.core.errors import GossamerError
from gossamer.core.format import Format, checked
from gossamer.core.report import read_json
from gossamer.formats import Bitmask, Wrapped
from gossamer.models import INDEX, PACKED, PICKLES, quiet
from gossamer.sites._packed import LAYOUTS, Packed, Weight, checksum, opened, stop
from gossamer.sites._sparse_linear import SparseLinear
from gossamer.sites._walk import Target, targets
from gossamer.sites._widths import widths_of

SHARD_BYTES = 2**30


def write_packed(model: Any, folder: Path) -> None:
    """Write a model with its weights packed: those that are, or if none is, every target that takes fewer bytes as a Bitmask.

    One weight at a time is packed, and goes to disk with its shard; the model is only read.

    Raises:
        GossamerError: nothing can be packed; before anything is written.
    """
    layers, state = sparse_layers(model), saved_state(model)
    # A tied weight is in the state under one name.
    chosen = [] if layers else [t for t in targets(model) if t.name in state and _worth_packing(t)]
    if not layers and not chosen:
        raise GossamerError("there is nothing to pack: no weight has zeros enough to take fewer bytes packed; prune it first")
    things: dict[int, tuple[str, SparseLinear | Target]] = {}  # by the tensor that stands for each
    for target in chosen:
        things[id(state[target.name])] = target.name.removesuffix(".weight"), target
    for name, layer in layers.items():
        things[id(state[f"{name}.values"])] = name, layer
        for other in layer.packed.tensors().keys() - {"values"}:  # these go where the values go
            del state[f"{name}.{other}"]
    stored = renamed(model, state)
    if layers and (lost := things.keys() - {id(tensor) for tensor in stored.values()}):
        told = f"{type(model).__name__} stores it as a part of another weight"
        raise GossamerError(f"{things[lost.pop()][0]} cannot be saved packed: {told}")

    shards, weights, crc32 = Shards(folder), {}, {}
    for key, tensor in stored.items():
        parts = {key: tensor}
        if id(tensor) in things:
            (module, thing), linear = things[id(tensor)], key.rpartition(".")[0]
            packed = _pack(thing)
            weights[linear] = Weight.of(packed, thing.transposed, None if module == linear else module)
            parts = {f"{linear}.{name}": part for name, part in [*packed.tensors().items(), ("weight", stop())]}
        for name, part in parts.items():
            crc32[name] = checksum(part)
            shards.add(name, part)
    shards.finish()
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    config.quantization_config = Packed(weights, crc32, widths_of(model)).to_json()
    with quiet():
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def with_products(state: dict[str, Tensor], products: Mapping[Target, Format], model: str) -> tuple[dict[str, Tensor], Packed]:
    """Return a block's tensors, by their names in files, with those of products in place of weights; and what a config says.

    Raises:
        GossamerError: the files hold one of the weights under no name of its own.
    """
    weights = {}
    for target, packed in products.items():
        name = target.name.removesuffix(".weight")
        if target.name not in state:
            raise GossamerError(f"{name} cannot be saved packed: {model} stores it as a part of another weight")
        weights[name] = Weight.of(packed, target.transposed)
        state |= {f"{name}.{part}": tensor for part, tensor in [*packed.tensors().items(), ("weight", stop())]}
    return state, Packed(weights, {name: checksum(tensor) for name, tensor in state.items()})


def write_dense(source: Path, folder: Path) -> list[dict[str, Any]]:
    """Write a packed checkpoint's directory as the dense one it was, shard by shard.

    Returns:
        What sparsity.json has to say where products were multiplied out, a row for each packed weight; else nothing.

    Raises:
        GossamerError: it is not packed, or not sound.
    """
    packed, files = opened(source)
    shards = Shards(folder)
    rows: list[dict[str, Any]] = []
    multiplied = False
    for name in files:
        linear, _, tensor = name.rpartition(".")
        weight = packed.weights.get(linear)
        if weight is None or tensor not in (*weight.tensors, "weight"):
            shards.add(name, files[name])
        elif tensor == "values":  # stands for the rest
            try:
                dense = weight.read(files.of(linear, weight)).dense()
            except GossamerError as error:
                raise GossamerError(f"{source}: {linear}: {error}") from error
            stored = dense.T if weight.transposed else dense
            shards.add(f"{linear}.weight", stored)
            rows.append(_counted(f"{weight.module or linear}.weight", stored))
            multiplied |= weight.layout is Wrapped
    shards.finish()
    for other in source.iterdir():
        if other.is_dir():
            if not other.name.startswith("."):
                shutil.copytree(other, folder / other.name)
        elif other.suffix not in (".safetensors", *PICKLES) and other.name != INDEX:
            shutil.copyfile(other, folder / other.name)
    config = read_json(source / "config.json")
    del config["quantization_config"]
    if packed.widths:  # dense, and still of other widths than its sizes say
        config["quantization_config"] = Packed({}, {}, packed.widths).to_json()
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return rows if multiplied else []


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Return a model's packed linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def packed_row(name: str, layer: SparseLinear) -> dict[str, Any]:
    """Return what sparsity.json says of a packed linear: what it would say of the dense one; of a product, what of its core."""
    out, in_ = layer.packed.shape
    nnz = layer.packed.nnz
    shape = [in_, out] if layer.transposed else [out, in_]
    return {"name": f"{name}.weight", "shape": shape, "sparsity": 1 - nnz / (out * in_), "nnz": nnz}


def _counted(name: str, w: Tensor) -> dict[str, Any]:
    nnz = int(w.count_nonzero())
    return {"name": name, "shape": list(w.shape), "sparsity": 1 - nnz / w.numel(), "nnz": nnz}


def for_file(packed: Format) -> Format:
    """Return a format that files hold: the weight's own, or a Bitmask where that is for running only."""
    return packed if type(packed) in LAYOUTS.values() else Bitmask.pack(packed.dense())


def saved_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors that a model's files hold, by the names that the model gives them; tied ones once.

    Raises:
        GossamerError: one of them is not in memory, or another quantization has the model.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", PACKED)
    if method != PACKED:
        raise GossamerError(f"the model is quantized with {method}, and cannot be packed")
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise GossamerError(f"{name} is not in memory (offloaded?): load the model whole to save it packed")
    found: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, model)
    return found


def renamed(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names, and in the form, in which transformers stores them."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return found


def _worth_packing(target: Target) -> bool:
    """Whether a weight takes fewer bytes as a Bitmask."""
    if target.stacked:
        return False
    try:
        matrix, mask = checked(target.matrices()[0], None)
    except GossamerError as error:
        raise GossamerError(f"{target.name}: {error}") from error
    return int(mask.count_nonzero()) * matrix.itemsize + mask.shape[0] * -(-mask.shape[1] // 8) < matrix.nbytes


def _pack(thing: SparseLinear | Target) -> Format:
    return for_file(thing.packed) if isinstance(thing, SparseLinear) else Bitmask.pack(thing.matrices()[0])


class Shards:
    """Tensors written to safetensors files of about ``SHARD_BYTES``, named and indexed as transformers does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._open and sum(t.nbytes for t in self._open.values()) + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._open[name] = tensor.detach().contiguous()
        self._bytes += tensor.nbytes

    def finish(self) -> None:
        self._write()
        if len(self._files) == 1:
            self._temporary(1).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            shard = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            self._temporary(number).rename(self._folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        self._files.append(list(self._open))
        try:
            save_file(self._open, self._temporary(len(self._files)), metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise OSError(str(error)) from error
        self._open = {}

    def _temporary(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"
