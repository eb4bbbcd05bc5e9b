"""The coupling table: which rows and columns of a block's weights live or die together. No other file knows.

Roles are found by the names of modules that stand beside one another; sizes by their shapes; no model family is named.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.structure import Group
from gossamer.sites._walk import text_config

# An MLP: the linears that make its channels, then those that may read them.
CHANNELS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("gate_up_proj",), ("down_proj",)),  # gate and up in one, one after the other
    (("up_proj",), ("down_proj",)),
    (("fc1",), ("fc2",)),
    (("c_fc",), ("c_proj",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
)
FUSED = frozenset({"gate_up_proj"})

# Attention: the linears that make queries, keys and values, then those that may read the heads.
HEADS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),
    (("c_attn",), ("c_proj",)),  # the three in one, one after the other
)

# What the modules and configurations of transformers call the counts.
HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads")
KEY_VALUE_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads")
WIDTH_ATTRIBUTES = ("split_size",)  # heads · head_dim
CHANNEL_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
HEAD_SIZES, KEY_VALUE_SIZES = ("num_attention_heads",), ("num_key_value_heads",)


@dataclass(frozen=True)
class Part:
    """Where a group's members stand in one linear.

    Attributes:
        module: the linear.
        rows: along its outputs, else along its inputs.
        lots: for each of the lots that the linear holds one after another, the rows of one member.
    """

    module: Any
    rows: bool
    lots: tuple[int, ...]

    @property
    def dim(self) -> int:
        """The dimension of the weight as stored along which members stand."""
        return int(self.rows == is_transposed(self.module))

    def indices(self, count: int, members: Tensor) -> Tensor:
        """Return where these of ``count`` members stand."""
        found, start = [], 0
        for width in self.lots:
            found.append((start + members[:, None] * width + torch.arange(width, device=members.device)).flatten())
            start += count * width
        return torch.cat(found)


@dataclass(frozen=True)
class Coupling:
    """What one kind of group is made of in one block.

    Attributes:
        kind: "channels" or "heads".
        block: the index of the block.
        owner: the module whose children the linears are.
        count: how many members there are.
        parts: the linears that make them, then the one that reads them.
        head_dim: of a head; 0 for channels.
    """

    kind: str
    block: int
    owner: Any
    count: int
    parts: tuple[Part, ...]
    head_dim: int = 0

    @property
    def out(self) -> Any:
        """The linear that reads the members."""
        return self.parts[-1].module

    @property
    def made(self) -> tuple[int, int, int]:
        """What tells two couplings of one model apart: members, query heads in each, and the size of a head."""
        return self.count, self.queries, self.head_dim

    @property
    def queries(self) -> int:
        """Query heads in one member."""
        return self.parts[-1].lots[0] // self.head_dim if self.head_dim else 0

    def group(self, values: Sequence[Tensor] | None = None) -> Group:
        """Return the group as methods see it; with tensors in the place of its parts' weights, as these are stored."""
        into, size = [], 0
        for part, weight in zip(self.parts, values or [part.module.weight.data for part in self.parts], strict=True):
            matrix = weight.T if is_transposed(part.module) else weight
            size += sum(part.lots) * matrix.shape[1 if part.rows else 0]
            if part.rows:
                size += sum(part.lots) if part.module.bias is not None else 0
                lots = matrix.split([self.count * width for width in part.lots])
                into += [lot.reshape(self.count, -1) for lot in lots]
            else:
                out = matrix
        return Group(self.kind, self.block, self.count, size, out, tuple(into))

    def keep(self, members: Tensor) -> None:
        """Leave only these members (ascending indices), in every linear, its bias, and the counts that the modules hold."""
        for part in self.parts:
            weight: Any = part.module.weight
            at = part.indices(self.count, members.to(weight.device))
            part.module.weight = _like(weight, weight.data.index_select(part.dim, at))
            if part.rows and part.module.bias is not None:
                part.module.bias = _like(part.module.bias, part.module.bias.data.index_select(0, at))
            tell_sizes(part.module)
        heads = len(members) * self.queries
        told = {**dict.fromkeys(HEAD_ATTRIBUTES, heads), **dict.fromkeys(KEY_VALUE_ATTRIBUTES, len(members))}
        told |= dict.fromkeys(WIDTH_ATTRIBUTES, heads * self.head_dim)
        for name, size in (told if self.head_dim else dict.fromkeys(CHANNEL_SIZES, len(members))).items():
            if isinstance(getattr(self.owner, name, None), int):
                setattr(self.owner, name, size)

    def sizes(self, config: Any) -> dict[str, int]:
        """Return what a configuration would have to say if every block had these."""
        if not self.head_dim:
            return _present(config, CHANNEL_SIZES, self.count)
        heads = _present(config, HEAD_SIZES, self.count * self.queries) | _present(config, KEY_VALUE_SIZES, self.count)
        return heads | _present(config, ("head_dim",), self.head_dim)


def couplings(model: nn.Module, blocks: Iterable[nn.Module], kind: str) -> list[Coupling]:
    """Return the couplings of a kind, one a block.

    Raises:
        GossamerError: a block has none that the table knows, or several.
    """
    find = {"channels": _channels, "heads": _heads}[kind]
    found = []
    for index, block in enumerate(blocks):
        here = list(find(model, block, index))
        if len(here) != 1:
            told = f"{len(here)} of them" if here else "none"
            what = "MLP" if kind == "channels" else "attention"
            raise GossamerError(
                f"{type(model).__name__}: one {what} whose {kind} can be removed is wanted in each block, and block {index} "
                f"has {told}; {known(kind)}"
            )
        found += here
    return found


def known(kind: str) -> str:
    """Say what the table knows of a kind."""
    table = CHANNELS if kind == "channels" else HEADS
    names = "; ".join(f"{' and '.join(into)} with {' or '.join(out)}" for into, out in table)
    return f"known by the names of their linears: {names}"


def _channels(model: nn.Module, block: nn.Module, index: int) -> Iterator[Coupling]:
    for owner, into, out in _found(block, CHANNELS):
        lots = {name: (1, 1) if name in FUSED else (1,) for name in into}
        count, in_ = shape_of(out)[1], {shape_of(m)[0] / len(lots[name]) for name, m in into.items()}
        if in_ == {count} and not (owner is not block and _others(owner, (*into.values(), out))):
            parts = (*(Part(m, True, lots[name]) for name, m in into.items()), Part(out, False, (1,)))
            yield Coupling("channels", index, owner, count, parts)


def _heads(model: nn.Module, block: nn.Module, index: int) -> Iterator[Coupling]:
    config = text_config(model)
    for owner, into, out in _found(block, HEADS):
        head_dim = getattr(owner, "head_dim", None) or getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        lots: dict[str, tuple[int, ...]]
        queries, rows = shape_of(out)[1] // head_dim, {name: shape_of(m)[0] for name, m in into.items()}
        if len(into) == 1:
            count, lots = queries, dict.fromkeys(into, (head_dim,) * 3)
        else:
            count = rows["k_proj"] // head_dim
            wide = queries // count * head_dim
            lots = {"q_proj": (wide,), "k_proj": (head_dim,), "v_proj": (head_dim,)}
        fits = all(rows[name] == count * sum(lot) for name, lot in lots.items()) and shape_of(out)[1] == queries * head_dim
        if not fits or queries % count or any(p.numel() != head_dim for p in _others(owner, (*into.values(), out))):
            continue  # norms over all heads, sinks and biases a head: not in the table
        parts = (*(Part(m, True, lots[name]) for name, m in into.items()), Part(out, False, (queries // count * head_dim,)))
        yield Coupling("heads", index, owner, count, parts, head_dim)


def _found(block: nn.Module, table: Any) -> Iterator[tuple[nn.Module, Mapping[str, Any], Any]]:
    """Yield the modules of a block that have children of an entry's names: each with those, for its first entry that fits."""
    for owner in block.modules():
        children = {name: child for name, child in owner.named_children() if is_linear(child)}
        for into, outs in table:
            out = next((children[name] for name in outs if name in children), None)
            if out is not None and all(name in children for name in into):
                yield owner, {name: children[name] for name in into}, out
                break


def _others(owner: nn.Module, linears: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters of a module that stand outside its linears."""
    inside = {id(p) for linear in linears for p in linear.parameters()}
    return [p for p in owner.parameters() if id(p) not in inside]


def is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear is stored (in, out), as Conv1D is."""
    return not isinstance(module, nn.Linear)


def shape_of(linear: Any) -> tuple[int, int]:
    """Return a linear's (out, in)."""
    out, in_ = linear.weight.T.shape if is_transposed(linear) else linear.weight.shape
    return int(out), int(in_)


def tell_sizes(linear: Any) -> None:
    """Let a linear say what the shape of its weight is now."""
    out, in_ = shape_of(linear)
    for name, size in (("out_features", out), ("in_features", in_), ("nf", out), ("nx", in_)):
        if hasattr(linear, name):
            setattr(linear, name, size)


def _present(config: Any, names: Sequence[str], size: int) -> dict[str, int]:
    """Return the first of these names that a configuration has, with its size."""
    return next(({name: size} for name in names if hasattr(config, name)), {})


def _like(parameter: Any, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.contiguous(), requires_grad=parameter.requires_grad)
