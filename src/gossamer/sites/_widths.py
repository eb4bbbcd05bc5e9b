"""Whether a configuration can say how wide each block is, and what a checkpoint says where it cannot.

Where all blocks have the same widths, the sizes in config.json are changed, and plain transformers builds the model. Where they
differ, or the configuration has no word for them, its entry ``quantization_config`` lists the members that each block keeps,

    {"quant_method": "gossamer", ..., "widths": {"channels": [1024, 1536, ...], "heads": [3, 2, ...]}}

and the modules are cut to that before weights are loaded. ``"ranks.mlp.up_proj": [12, 32, ...]`` lists the rank of a linear in
each block in the same way: where it is less than the shape allows, the product of two stands there (see `_low_rank`). Whether a
list is needed decides itself: the model is built anew from its configuration, without weights, and compared.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import GossamerError
from gossamer.models import quiet
from gossamer.sites._coupling import couplings, is_linear, shape_of
from gossamer.sites._low_rank import LowRank
from gossamer.sites._walk import blocks_of, text_config

KINDS = ("channels", "heads")
RANKS = "ranks."  # and a linear's name in its block
NUMBERS = ("layer_idx", "layer_id", "layer_number")  # what modules call the index of their block

Widths = Mapping[str, list[int]]


def widths_of(model: Any) -> Widths:
    """Return the widths that a model's configuration lists by block; nothing for an ordinary one."""
    entry = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(entry, dict):  # as config.json has it
        return dict(entry.get("widths", {}))
    packed = getattr(entry, "packed", None)
    return dict(packed.widths) if packed is not None else {}


def check_widths(value: Any) -> dict[str, list[int]]:
    """Return what the entry ``widths`` of config.json says.

    Raises:
        GossamerError: it is no object of kinds and lists of positive integers.
    """
    told = "the entry widths of quantization_config in config.json"
    if not isinstance(value, dict) or not value:
        raise GossamerError(f"{told} is no object of {' and '.join(KINDS)}")
    for kind, sizes in value.items():
        if kind not in KINDS and not kind.startswith(RANKS):
            raise GossamerError(f"{told} has the unknown key {kind[:40]!r}; known: {', '.join(KINDS)}, {RANKS}NAME")
        if not isinstance(sizes, list) or any(type(n) is not int or n < 1 for n in sizes):
            raise GossamerError(f"{told}: {kind} is no list of positive integers, one a block")
    return value


def cut(model: nn.Module, widths: Widths) -> None:
    """Cut a model that was built from its configuration to the widths listed for its blocks.

    Raises:
        GossamerError: they do not fit it.
    """
    _, blocks = blocks_of(model)
    for kind, sizes in sorted(widths.items(), key=lambda entry: entry[0].startswith(RANKS)):  # which depend on the others
        if len(sizes) != len(blocks):
            raise GossamerError(f"config.json lists {len(sizes)} widths of {kind}, and the model has {len(blocks)} blocks")
        if kind.startswith(RANKS):
            _cut_ranks(blocks, kind.removeprefix(RANKS), sizes)
            continue
        for coupling, n in zip(couplings(model, blocks, kind), sizes, strict=True):
            if n > coupling.count:
                told = f"{n} {kind} for block {coupling.block}, and its sizes make {coupling.count}"
                raise GossamerError(f"config.json lists {told}")
            if n < coupling.count:
                coupling.keep(torch.arange(n))


def _cut_ranks(blocks: nn.ModuleList, name: str, ranks: Sequence[int]) -> None:
    for index, (block, rank) in enumerate(zip(blocks, ranks, strict=True)):
        linear = dict(block.named_modules()).get(name)
        if linear is None or not is_linear(linear):
            raise GossamerError(f"config.json lists ranks of {name}, which is no linear of block {index}")
        if rank > min(shape_of(linear)):
            raise GossamerError(
                f"config.json lists {rank} ranks of {name} for block {index}, and its shape is {shape_of(linear)}"
            )
        if rank < min(shape_of(linear)):
            block.set_submodule(name, LowRank.blank(linear, rank))


def _ranks(blocks: nn.ModuleList) -> dict[str, list[int]]:
    """Return the ranks of every linear that two stand for in some block."""
    names = [name for block in blocks for name, module in block.named_modules() if isinstance(module, LowRank)]
    inside: list[dict[str, Any]] = [dict(block.named_modules()) for block in blocks]
    return {
        RANKS + name: [m.rank if isinstance(m := own[name], LowRank) else min(shape_of(m)) for own in inside]
        for name in dict.fromkeys(names)
    }


def settle(model: Any) -> bool:
    """Make a model's configuration say what its blocks are now; return whether plain transformers can build it from that."""
    _, blocks = blocks_of(model)
    config, listed = copy.deepcopy(model.config), widths_of(model)
    widths: dict[str, list[int]] = {}
    _plain(config)
    for kind in KINDS:
        try:
            found = couplings(model, blocks, kind)
        except GossamerError:  # no method can have touched what is not there, or now is a product
            widths |= {kind: listed[kind]} if kind in listed else {}
            continue
        sizes = [coupling.sizes(text_config(model)) for coupling in found]
        tried = copy.deepcopy(config)
        for name, size in sizes[0].items():
            setattr(tried.get_text_config(), name, size)
        made = [c.made for c in found]
        if all(s == sizes[0] for s in sizes) and _made(type(model), tried, kind) == made:
            config = tried
        elif _made(type(model), config, kind) != made:
            widths[kind] = [c.count for c in found]
    widths |= _ranks(blocks)
    fresh = built(type(model), config, widths)
    shapes = [{name: tuple(tensor.shape) for name, tensor in m.state_dict().items()} for m in (fresh, model)]
    told = difference(fresh, model) or next((name for name in shapes[1] if shapes[0].get(name) != shapes[1][name]), None)
    if told:
        raise GossamerError(f"{type(model).__name__} cannot be built again as it is now: {told}")
    from gossamer.hf import shaped

    adopt(model, config)
    shaped(model, widths)
    return not widths


def adopt(model: Any, config: Any) -> None:
    """Let a model's configuration say what another one does; the objects stay, for its modules hold them too."""
    own, text = model.config, model.config.get_text_config()
    changed = config.get_text_config()
    text.__dict__.update({k: v for k, v in changed.__dict__.items() if k != "quantization_config"})
    if own is not text:
        own.__dict__.update({k: v for k, v in config.__dict__.items() if v is not changed and k != "quantization_config"})


def narrower(model: Any, width: int) -> Any:
    """Return the configuration of a model whose hidden states are so wide, and whose head is no longer its embeddings.

    Raises:
        GossamerError: no configuration says so, with heads of the size that they have.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    blocks = blocks_of(model)[1]
    heads = couplings(model, blocks, "heads")
    for name, size in {**heads[0].sizes(text), "hidden_size": width}.items():
        setattr(text, name, size)
    config.tie_word_embeddings = text.tie_word_embeddings = False
    built(type(model), config, {})
    if _made(type(model), config, "heads") != [coupling.made for coupling in heads]:
        raise GossamerError(
            f"{type(model).__name__} derives its heads from hidden_size, so hidden states cannot be made narrower"
        )
    return config


def _made(kind_of_model: Any, config: Any, kind: str) -> list[Any] | None:
    """Return what each block of a model built from a configuration has; None if it cannot be built, or has none."""
    try:
        fresh = built(kind_of_model, config, {})
        return [c.made for c in couplings(fresh, blocks_of(fresh)[1], kind)]
    except GossamerError:
        return None


def built(kind_of_model: Any, config: Any, widths: Widths) -> Any:
    """Build a model without weights from a configuration and widths.

    Raises:
        GossamerError: transformers refuses the configuration, or the widths do not fit it.
    """
    config = copy.deepcopy(config)
    _plain(config)
    with quiet(), torch.device("meta"):
        try:
            for part in {id(c): c for c in (config, config.get_text_config())}.values():
                getattr(part, "validate", lambda: None)()  # what transformers does when it saves one
            fresh = kind_of_model(config)
        except Exception as error:  # what a model's constructor raises for sizes that do not fit is no contract
            raise GossamerError(f"no model can be built: {' '.join(str(error).split())[:200]}") from error
    cut(fresh, widths)
    return fresh


def difference(fresh: nn.Module, model: nn.Module, only: Sequence[int] | None = None) -> str | None:
    """Return what differs between a model built anew and one with weights, in shapes and in the numbers its modules hold.

    ``only``: the blocks of ``model`` that the fresh one's stand for; all of them by default.
    """
    name, blocks = blocks_of(model)
    theirs = dict(_parts(name, blocks, only))
    for at, new in _parts(name, blocks_of(fresh)[1], None):
        if at not in theirs:
            return f"{at} is not in it"
        old = theirs.pop(at)
        shapes = [{k: tuple(p.shape) for k, p in m.named_parameters(recurse=False)} for m in (new, old)]
        if shapes[0] != shapes[1]:
            return f"{at} would have {shapes[0]}, and has {shapes[1]}"
        scalars = [{k: v for k, v in vars(m).items() if _is_told(k, v)} for m in (new, old)]
        if scalars[0] != scalars[1]:
            keys = [k for k in scalars[0] | scalars[1] if scalars[0].get(k) != scalars[1].get(k)]
            return f"{at}.{keys[0]} would be {scalars[0].get(keys[0])}, and is {scalars[1].get(keys[0])}"
    return f"{next(iter(theirs))} would be missing" if theirs else None


def renumber(model: nn.Module) -> None:
    """Tell the modules of each block its index."""
    for index, block in enumerate(blocks_of(model)[1]):
        for module in block.modules():
            for name in NUMBERS:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, index)


def _parts(name: str, blocks: nn.ModuleList, only: Sequence[int] | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of some blocks under the names they have once these are all there are."""
    for index, old in enumerate(range(len(blocks)) if only is None else only):
        yield from blocks[old].named_modules(prefix=f"{name}.{index}")


def _is_told(name: str, value: Any) -> bool:
    """Whether an attribute of a module is a number, a word or nothing that its configuration has decided."""
    passing = (*NUMBERS, "training", "gradient_checkpointing")
    return not name.startswith("_") and name not in passing and isinstance(value, int | float | str | None)


def _plain(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
