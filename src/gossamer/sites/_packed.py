"""Packed weights in a checkpoint: what its config says of them, and every check that comes before they are used.

The entry ``quantization_config`` of config.json names each packed weight, with its format, and each tensor of the files, with
its CRC-32. A packed weight's tensors stand in the files under its linear's name: ``layers.0.mlp.up_proj.values``, ``.bits``.
Beside them stands a ``.weight`` of one entry: transformers without `gossamer.hf`, which would only warn and go on with random
numbers, stops at its shape.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format
from gossamer.core.report import read_json
from gossamer.formats import NM, Bitmask, Block, Grouped, Wrapped
from gossamer.models import INDEX, PACKED, check_directory
from gossamer.sites._widths import Widths, check_widths

VERSION = 2
LAYOUTS: dict[str, type[Format]] = {"Bitmask": Bitmask, "Block": Block, "Grouped": Grouped, "NM": NM, "Wrapped": Wrapped}
_SIZES: dict[type[Format], tuple[str, str]] = {Block: ("h", "w"), Grouped: ("h", "w"), NM: ("n", "m"), Wrapped: ("n", "m")}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Weight:
    """What the config says of one packed weight.

    Attributes:
        layout: the format's class.
        shape: (out, in).
        dtype: of the matrix.
        sizes: n and m for NM and Wrapped, h and w for Block and Grouped.
        transposed: dense, it is stored as (in, out), as Conv1D does.
        module: the linear's name in the model, where the files call it otherwise.
    """

    layout: type[Format]
    shape: tuple[int, int]
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)
    transposed: bool = False
    module: str | None = None

    @classmethod
    def of(cls, packed: Format, transposed: bool, module: str | None = None) -> Self:
        """Describe a weight that is packed in one of `LAYOUTS`."""
        return cls(type(packed), packed.shape, packed.dtype, _sizes(packed), transposed, module)

    @classmethod
    def parse(cls, name: str, value: Any) -> Self:
        """Read what `to_json` wrote.

        Raises:
            GossamerError: there is anything else.
        """
        entry = _Entry(f"the packed weight {name}", value)
        told = entry.take("format", str)
        if told not in LAYOUTS:
            raise entry.wrong(f"has the unknown format {told!r}; known: {', '.join(LAYOUTS)}")
        layout = LAYOUTS[told]
        shape = entry.take("shape", list)
        if len(shape) != 2 or any(type(n) is not int or not 0 < n < 2**31 for n in shape):
            raise entry.wrong(f"has the shape {shape}, not (out, in)")
        dtype = entry.take("dtype", str)
        if dtype not in _DTYPES:
            raise entry.wrong(f"has the dtype {dtype!r}; known: {', '.join(_DTYPES)}")
        sizes = {key: entry.take(key, int) for key in _SIZES.get(layout, ())}
        if any(not 0 < size <= 2**16 for size in sizes.values()):
            raise entry.wrong(f"has {' and '.join(f'{k} = {v}' for k, v in sizes.items())}")
        more = {key: entry.take(key, kind) for key, kind in (("transposed", bool), ("module", str)) if key in value}
        entry.end()
        return cls(layout, (shape[0], shape[1]), _DTYPES[dtype], sizes, **more)

    def to_json(self) -> dict[str, Any]:
        """Return what the config holds, as plain JSON values."""
        name = next(name for name, layout in LAYOUTS.items() if layout is self.layout)
        more: dict[str, Any] = {"transposed": True} if self.transposed else {}
        more |= {"module": self.module} if self.module is not None else {}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"format": name, "shape": list(self.shape), "dtype": dtype, **self.sizes, **more}

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors that files hold of it."""
        return _stored(self.layout)

    def read(self, tensors: Mapping[str, Tensor]) -> Format:
        """Make the format of its tensors, every one of them checked.

        Raises:
            GossamerError: they do not fit one another, or this.
        """
        packed: Format = self.layout.read(self.shape, tensors, **self._fixed)
        if (found := _sizes(packed)) != self.sizes:
            raise GossamerError(f"the packed weight's tiles are {found}, and its config says {dict(self.sizes)}")
        return packed

    def blank(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Format:
        """Return the format without numbers, on the meta device, to be loaded into; what is derived comes with `read`."""
        kinds = {name: dtype if t.is_floating_point() else t.dtype for name, t in tensors.items()}
        empty = {name: torch.empty_like(t, dtype=kinds[name], device="meta") for name, t in tensors.items()}
        empty |= {name: torch.empty(0, dtype=torch.int64, device="meta") for name in self.layout.derived}
        return self.layout(shape=self.shape, **self._fixed, **empty)  # type: ignore[call-arg]

    @property
    def _fixed(self) -> Mapping[str, int]:
        return self.sizes if self.layout in (NM, Wrapped, Grouped) else {}


@dataclass(frozen=True)
class Packed:
    """What the config says of a packed checkpoint.

    Attributes:
        weights: the packed weights by the name that the files give their linear.
        crc32: the checksum of each tensor of the files, dense ones too.
        widths: how wide each block is, where the sizes of the config do not say it (see `_widths`).
    """

    weights: Mapping[str, Weight]
    crc32: Mapping[str, int]
    widths: Widths = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Read what `to_json` wrote.

        Raises:
            GossamerError: there is anything else.
        """
        entry = _Entry("the quantization_config", value)
        if (method := entry.take("quant_method", str)) != PACKED:
            raise entry.wrong(f"has the quant_method {method!r}, not {PACKED!r}")
        if (version := entry.take("version", int)) != VERSION:
            raise entry.wrong(f"has the version {version}; this gossamer reads version {VERSION}")
        weights = {name: Weight.parse(name, weight) for name, weight in entry.take("weights", dict).items()}
        crc32 = entry.take("crc32", dict)
        if any(type(c) is not int or not 0 <= c < 2**32 for c in crc32.values()):
            raise entry.wrong("has a crc32 that is no 32-bit number")
        widths = check_widths(entry.take("widths", dict)) if "widths" in value else {}
        entry.end()
        return cls(weights, crc32, widths)

    def to_json(self) -> dict[str, Any]:
        """Return the config's entry, as plain JSON values."""
        weights = {name: weight.to_json() for name, weight in self.weights.items()}
        entry = {"quant_method": PACKED, "version": VERSION, "weights": weights, "crc32": dict(self.crc32)}
        return {**entry, "widths": dict(self.widths)} if self.widths else entry

    def check(self, files: "Files") -> None:
        """Check that files hold exactly the tensors that this lists, to the bit, and those of each packed weight.

        Raises:
            GossamerError: one is missing, is there but not listed, or is different.
        """
        if self.widths and not self.weights and not self.crc32:  # nothing is packed: an ordinary checkpoint, but for its widths
            return
        for name in sorted(self.crc32.keys() ^ files.keys()):
            raise GossamerError(f"{files} {'lacks' if name in self.crc32 else 'holds, and its config does not list,'} {name}")
        there: dict[str, set[str]] = {}
        for name in files:
            linear, _, tensor = name.rpartition(".")
            there.setdefault(linear, set()).add(tensor)
        for name, weight in self.weights.items():
            for tensor in sorted(there.get(name, set()) - {"bias"} ^ {*weight.tensors, "weight"}):
                told = "lacks" if tensor in {*weight.tensors, "weight"} else "has no use for"
                raise GossamerError(f"{files}: the packed weight {name} {told} the tensor {tensor}")
            typed = weight.layout.typed
            if (dtype := files[f"{name}.{typed}"].dtype) != weight.dtype:
                raise GossamerError(f"{files}: {name}.{typed} is {dtype}, and its config says {weight.dtype}")
        for name, tensors in there.items():
            if "values" in tensors and name not in self.weights and not _has_own_weight(files, name, tensors):
                raise GossamerError(f"{files}: the config has no packed weight {name}, and the files hold its values")
        for name in files:
            if checksum(files[name]) != self.crc32[name]:
                raise GossamerError(f"{files}: {name} is damaged: it has another checksum than its config says")


def stop() -> Tensor:
    """Return what stands in files where a packed linear's weight would."""
    return torch.zeros(1)


def _has_own_weight(files: "Files", name: str, tensors: set[str]) -> bool:
    return "weight" in tensors and files[f"{name}.weight"].shape != stop().shape


class Files(Mapping[str, Tensor]):
    """The tensors of safetensors files by name; each is mapped from its file, not read, until it is used.

    Raises:
        GossamerError: a file is truncated or corrupt, or two hold the same tensor.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._file: dict[str, Any] = {}
        self._where = paths[0].parent
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                names: list[str] = list(file.keys())  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                raise GossamerError(f"{path} is truncated or corrupt: {' '.join(str(error).split())[:200]}") from error
            for name in names:
                if name in self._file:
                    raise GossamerError(f"{path} holds {name}, which another file of it holds too")
                self._file[name] = file

    def __getitem__(self, name: str) -> Tensor:
        with torch.device("cpu"):  # a model may be in the making on another
            tensor: Tensor = self._file[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def __str__(self) -> str:
        return str(self._where)

    def of(self, name: str, weight: Weight) -> dict[str, Tensor]:
        """Return a packed weight's tensors by field."""
        return {tensor: self[f"{name}.{tensor}"] for tensor in weight.tensors}


def opened(path: Path) -> tuple[Packed, Files]:
    """Open a packed checkpoint's directory, all of it checked but for what `Weight.read` sees.

    Raises:
        GossamerError: it is not packed, or not sound.
    """
    check_directory(path)
    config = read_json(path / "config.json")
    if "quantization_config" not in config:
        raise GossamerError(f"{path} is not packed: its config.json has no quantization_config")
    packed = Packed.parse(config["quantization_config"])
    index = path / INDEX
    shards = {Path(str(name)).name for name in read_json(index)["weight_map"].values()} if index.exists() else set()
    files = Files([path / name for name in sorted(shards or {"model.safetensors"})])
    packed.check(files)
    return packed, files


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor: of the text "bfloat16 64x32", its dtype and shape, and then of its bytes."""
    told = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(plain.numpy().data, zlib.crc32(told.encode()))


class _Entry:
    """A JSON object read key by key, so that whatever is missing, of another kind or left over is said."""

    def __init__(self, what: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise GossamerError(f"{what} of config.json is no JSON object")
        self._what, self._left = what, dict(value)

    def take(self, key: str, kind: type) -> Any:
        if key not in self._left:
            raise self.wrong(f"has no {key}")
        value = self._left.pop(key)
        if type(value) is not kind:
            raise self.wrong(f"has the {key} {str(value)[:60]!r}")
        return value

    def end(self) -> None:
        for key in self._left:
            raise self.wrong(f"has the unknown key {key!r}")

    def wrong(self, told: str) -> GossamerError:
        return GossamerError(f"{self._what} of config.json {told}")


@cache
def _stored(layout: type[Format]) -> list[str]:
    return [name for name, kind in get_type_hints(layout).items() if kind is Tensor and name not in layout.derived]


def _sizes(packed: Format) -> dict[str, int]:
    if isinstance(packed, NM | Wrapped):
        return {"n": packed.n, "m": packed.m}
    if isinstance(packed, Grouped):
        return {"h": packed.h, "w": packed.w}
    return {"h": packed.values.shape[1], "w": packed.values.shape[2]} if isinstance(packed, Block) else {}
