"""A checkpoint opened without its blocks: each is read from its shards when its turn comes, and dropped after it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models import causal_lm, filled
from gossamer.sites._rows import give_back
from gossamer.sites._walk import block_lists


class Checkpoint:
    """A model whose blocks stand on disk until `fetch`.

    transformers places every block on "disk" (which for safetensors means: where it already is; experts that a checkpoint
    keeps apart are stacked into ``scratch``), accelerate knows where each weight lies, and `fetch` reads one block of them.

    Args:
        path: a checked model directory.
        scratch: an empty folder for weights that have to be converted.
        skeleton: the same model without weights, as `gossamer.models.skeleton` gives it.
        whole: load everything at once instead, for methods that need the whole model.
    """

    def __init__(self, path: Path, scratch: Path, skeleton: nn.Module, *, whole: bool) -> None:
        self.whole = whole
        self._stored: dict[str, dict[tuple[nn.Module, str], Any]] = {}
        if whole:
            self.model = causal_lm(path)
            self.lists = block_lists(self.model)
            return
        places = dict.fromkeys(_beside(skeleton, list(block_lists(skeleton))), "cpu")
        places |= dict.fromkeys(block_lists(skeleton), "disk")
        self.model = filled(path, device_map=places, offload_folder=scratch).eval()
        self.lists = block_lists(self.model)
        self._take_over()

    def _take_over(self) -> None:
        """Note where accelerate finds each weight of the blocks, then remove its hooks: blocks are fetched whole, by us."""
        from accelerate.hooks import remove_hook_from_module

        for list_name, index, block in self:
            stored = self._stored.setdefault(f"{list_name}.{index}", {})
            for module in block.modules():
                hook = getattr(module, "_hf_hook", None)
                for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    if tensor.is_meta:
                        stored[module, name] = hook.weights_map  # type: ignore[union-attr]
        remove_hook_from_module(self.model, recurse=True)

    def __iter__(self) -> Iterator[tuple[str, int, nn.Module]]:
        for name, blocks in self.lists.items():
            for index, block in enumerate(blocks):
                yield name, index, block

    def fetch(self, list_name: str, index: int) -> None:
        """Read one block's weights into memory."""
        for (module, name), weights in self._stored.get(f"{list_name}.{index}", {}).items():
            _put(module, name, weights[name].clone())  # a clone: what safetensors maps is the source file itself

    def drop(self, list_name: str, index: int) -> None:
        """Forget one block's weights."""
        for module, name in self._stored.get(f"{list_name}.{index}", {}):
            _put(module, name, torch.empty_like(getattr(module, name), device="meta"))
        give_back()

    def block_state(self, list_name: str, index: int) -> dict[str, Tensor]:
        """Return one block's weights under the names its checkpoint uses."""
        return self._saved_names(self.lists[list_name][index].state_dict(prefix=f"{list_name}.{index}."))

    def other_state(self) -> dict[str, Tensor]:
        """Return the weights outside the blocks under the names their checkpoint uses, tied ones once."""
        inside = tuple(f"{name}." for name in self.lists)
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        rest = {k: v for k, v in self.model.state_dict().items() if not k.startswith(inside) and k not in tied}
        return self._saved_names(rest)

    def _saved_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self.model, state).items()}


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _beside(model: nn.Module, lists: list[str]) -> Iterator[str]:
    """Yield the names that together with the lists of blocks cover the model: the siblings along the way to each list."""

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        yield from (prefix + name for name, _ in module.named_parameters(recurse=False))
        yield from (prefix + name for name, _ in module.named_buffers(recurse=False))
        for name, child in module.named_children():
            path = prefix + name
            if path in lists:
                continue
            if any(other.startswith(path + ".") for other in lists):
                yield from walk(child, path + ".")
            else:
                yield path

    yield from walk(model, "")
