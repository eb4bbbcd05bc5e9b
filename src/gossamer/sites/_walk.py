"""How a Hugging Face model is built: its repeated blocks, and the weights in them. No other file knows.

The blocks are the one ModuleList whose length is the configuration's ``num_hidden_layers``; no model family is named.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.grid import kept_tiles
from gossamer.core.pattern import Block
from gossamer.sites._sparse_linear import SparseLinear

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that can be pruned.

    Attributes:
        name: the parameter's name in the model's state dict.
        module: the module that holds it.
        attribute: its name there.
        block: the index of its block, None outside the blocks.
        transposed: stored (in, out), as Conv1D does.
        stacked: a stack of matrices, one an expert.
    """

    name: str
    module: nn.Module
    attribute: str
    block: int | None
    transposed: bool = False
    stacked: bool = False

    @property
    def parameter(self) -> Tensor:
        """The parameter's data, as stored."""
        tensor: Tensor = getattr(self.module, self.attribute).data
        return tensor

    def matrices(self) -> Tensor:
        """Return a view of the weight as a stack of matrices, (experts or 1, out, in); writing to it writes the weight."""
        view = self.parameter if self.stacked else self.parameter.unsqueeze(0)
        return view.transpose(-1, -2) if self.transposed else view

    def kept(self, group: int | None = None) -> Tensor:
        """Return the mask of what is kept, as stored: what is not 0, or the groups of so many inputs that hold anything.

        Raises:
            GossamerError: groups of so many do not divide the inputs.
        """
        w = self.parameter
        if group is None:
            return w != 0
        Block(1, group).check(self.matrices().shape, self.name)
        mask = kept_tiles(w.mT if self.transposed else w, 1, group)
        return mask.mT.contiguous() if self.transposed else mask


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the part of a model that reads text, None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost ModuleLists of ``num_hidden_layers`` blocks by name: one for most models.

    Raises:
        GossamerError: the model has no such list (what lists it has is named).
    """
    depth = getattr(text_config(model), "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, nn.ModuleList] = {}
    for name, module in lists.items():
        inside = any(name.startswith(outer + ".") for outer in found)
        if len(module) == depth and not inside:
            found[name] = module
    if not found:
        seen = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise GossamerError(
            f"{type(model).__name__} has no ModuleList of config.num_hidden_layers = {depth} blocks; its ModuleLists: {seen}"
        )
    return found


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the blocks of a model that has one stack of them.

    Raises:
        GossamerError: there is more than one stack, so that no single pass goes block by block.
    """
    lists = block_lists(model)
    if len(lists) > 1:
        raise GossamerError(
            f"{type(model).__name__} has {len(lists)} stacks of blocks ({', '.join(lists)}); "
            "calibration goes through one, so only a data-free method such as Magnitude prunes it"
        )
    return next(iter(lists.items()))


def targets(model: nn.Module, expression: str | None = None) -> list[Target]:
    """Return the weights to prune, in the order of the model.

    Every linear weight and stacked expert weight inside the blocks; never embeddings, norms, routers or the head, unless
    ``expression`` names one of those in full.

    Args:
        model: a transformers model.
        expression: comma-separated names, where * and ? match anything ("*.mlp.*"); with or without the final ".weight".

    Raises:
        GossamerError: nothing matches (what there is gets named), or the weights are packed.
    """
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise GossamerError(f"{type(model).__name__} holds packed weights: make them dense again first, with gossamer.unpack")
    inside = list(_inside(model))
    if expression is None:
        chosen = [target for target, is_router in inside if not is_router]
        if not chosen:
            raise GossamerError(f"{type(model).__name__} has no linear weight inside its blocks, so there is nothing to prune")
        return chosen
    parts = [part.strip() for part in expression.split(",") if part.strip()]
    everything = [*inside, *((target, True) for target in _outside(model, {target.name for target, _ in inside}))]
    chosen = [target for target, by_name_only in everything if _matches(target.name, parts, by_name_only)]
    if not chosen:
        kinds = sorted({_kind(target) for target, is_router in inside if not is_router})
        raise GossamerError(f"no weight matches {expression!r}; there are {', '.join(kinds)} in every block")
    return chosen


def _matches(name: str, parts: list[str], by_name_only: bool) -> bool:
    names = (name, name.removesuffix(".weight"))
    return any(n == part or (not by_name_only and fnmatch.fnmatchcase(n, part)) for part in parts for n in names)


def _kind(target: Target) -> str:
    """A weight's name within its block: ``mlp.up_proj.weight``."""
    return target.name.split(f".{target.block}.", 1)[1]


def _inside(model: nn.Module) -> Iterator[tuple[Target, bool]]:
    """Yield each weight inside the blocks, and whether it is a router's."""
    from transformers.pytorch_utils import Conv1D

    experts = _expert_count(model)
    for list_name, blocks in block_lists(model).items():
        for index, block in enumerate(blocks):
            modules = dict(block.named_modules(prefix=f"{list_name}.{index}"))
            for name, module in modules.items():
                if isinstance(module, nn.Linear | Conv1D):
                    parent = modules.get(name.rpartition(".")[0])
                    target = Target(f"{name}.weight", module, "weight", index, transposed=isinstance(module, Conv1D))
                    yield target, _is_router(module, parent, experts)
                elif experts and not type(module).__module__.startswith("torch."):
                    for attribute, parameter in module.named_parameters(recurse=False):
                        if parameter.ndim == 3 and parameter.shape[0] == experts:
                            flipped = bool(getattr(module, "is_transposed", False))
                            yield Target(f"{name}.{attribute}", module, attribute, index, flipped, stacked=True), False


def _is_router(module: nn.Module, parent: nn.Module | None, experts: int | None) -> bool:
    """Tell a linear from the hidden size to the experts (or to one gate value) that stands beside the experts."""
    if not experts or parent is None or getattr(module, "out_features", None) not in (1, experts):
        return False
    return any("expert" in name for name, _ in parent.named_children())


def _expert_count(model: nn.Module) -> int | None:
    counts = (getattr(text_config(model), name, None) for name in EXPERT_COUNTS)
    return next((count for count in counts if isinstance(count, int) and count > 1), None)


def _outside(model: nn.Module, inside: set[str]) -> Iterator[Target]:
    """Yield the matrices outside the blocks: head, embeddings."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | nn.Embedding) and isinstance(weight, Tensor) and f"{name}.weight" not in inside:
            yield Target(f"{name}.weight", module, "weight", None)
