"""How long a product takes on this device: measured once for each shape, dtype, batch, format, sparsity, and kept."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer import formats
from gossamer.core import pattern as patterns
from gossamer.core.atomic import write_text
from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format
from gossamer.core.grid import fitted, tiles, untiled
from gossamer.core.grid import rounded as on_grid
from gossamer.core.pattern import NM, Block, Pattern, Unstructured
from gossamer.core.report import environment, read_json
from gossamer.core.spec import names_in, parse
from gossamer.kernels._choice import choose
from gossamer.models import cache

# Those that a matrix can be packed in: a Wrapped weight comes as its factors.
FORMATS: dict[str, type[Format]] = {name: layout for name, layout in names_in(formats).items() if layout is not formats.Wrapped}
ROTATE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 29}  # several times the largest cache: every call finds its weights in memory
REPEATS = 30
STEP = 0.05  # sparsities are rounded down to a multiple of this


@dataclass(frozen=True)
class Product:
    """One entry of the table: a product x Wᵀ.

    Attributes:
        out, in_: the shape of W.
        dtype: "bfloat16", "float16" or "float32".
        batch: rows of x.
        format: a format's name, or "dense".
        pattern: the spec of the pattern its zeros follow ("Unstructured", "2:4").
        sparsity: fraction of zeros.
    """

    out: int
    in_: int
    dtype: str
    batch: int
    format: str = "dense"
    pattern: str = "Unstructured"
    sparsity: float = 0.0


def candidates(pattern: Pattern | None, device: torch.device) -> list[str]:
    """Return the names of the formats worth timing for a pattern on a device."""
    first = {NM: "NM", Block: "Block"}.get(type(pattern))  # type: ignore[arg-type]
    return [*([first] if first else []), "Bitmask", *(["Sliced", "Tiled"] if device.type == "cuda" else [])]


def spec_of(pattern: Pattern | None) -> str:
    """Write a pattern as the table does: within a row or over the tensor is the same to a product."""
    return "Unstructured" if pattern is None or isinstance(pattern, Unstructured) else str(pattern)


def rounded(sparsity: float) -> float:
    """Round a sparsity down to the table's grid: a weight is never judged by more zeros than it has."""
    return round(int((sparsity + 1e-3) / STEP) * STEP, 2)  # exact counts leave 70 % a hair below


def seconds(run: Callable[[int], Any], device: torch.device, turns: int, repeats: int = REPEATS) -> float:
    """Return the median time of one call.

    Args:
        run: called with 0, 1, ... turns − 1 again and again, so that each call can take other weights.
        device: on a GPU all turns are captured in one CUDA graph, and its replays are timed.
    """
    if device.type == "cuda":
        return _captured(run, turns, repeats)
    for turn in range(min(turns, 3)):
        run(turn)
    times = []
    for repeat in range(max(repeats, turns)):
        started = time.perf_counter()
        run(repeat % turns)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _captured(run: Callable[[int], Any], turns: int, repeats: int) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and handles made before the capture
        for turn in range(min(turns, 3)):
            run(turn)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            run(turn)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / turns)
    return statistics.median(times)


@torch.no_grad()
def measure(product: Product, device: torch.device) -> dict[str, Any]:
    """Time one product on random weights, many copies of which take turns.

    Returns:
        seconds, bytes of the stored weight, and the kernel that ran.

    Raises:
        GossamerError: the product's result is not the dense one's, in which case nothing is timed.
    """
    dtype = getattr(torch, product.dtype)
    if dtype not in DTYPES:
        raise GossamerError(f"cannot time {product.dtype}: supported are bfloat16, float16, float32")
    weight, mask = _random(product, dtype, device)
    x = torch.randn(product.batch, product.in_, device=device).to(dtype)
    if product.format == "dense":
        copies = [weight.clone() for _ in range(_turns(weight.nbytes, device))]
        return {
            "seconds": seconds(lambda i: torch.nn.functional.linear(x, copies[i]), device, len(copies)),
            "bytes": weight.nbytes,
            "kernel": "torch",
        }
    packed = FORMATS[product.format].pack(weight, mask, parse(product.pattern, names_in(patterns, Pattern), "pattern"))
    _check(packed.linear(x), x, weight)
    del mask
    own = vars(packed)
    many = [
        type(packed)(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()})
        for _ in range(_turns(packed.bytes, device))
    ]
    taken = seconds(lambda i: many[i].linear(x), device, len(many))
    return {"seconds": taken, "bytes": packed.bytes, "kernel": choose("auto", device, packed.kernels)}


def _random(product: Product, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(product.out, product.in_, generator=generator, device=device)
    if product.format == "dense":
        return weight.to(dtype), weight > 0
    pattern = parse(product.pattern, names_in(patterns, Pattern), "pattern")
    if pattern.takes_sparsity and isinstance(pattern, Unstructured):
        mask = torch.rand(weight.shape, generator=generator, device=device) >= product.sparsity
    else:
        mask = pattern.select(weight.abs(), product.sparsity if pattern.takes_sparsity else None)
    weight = weight.masked_fill_(~mask, 0)
    if product.format == "Grouped" and isinstance(pattern, Block):  # it packs what lies on 4-bit grids
        own = tiles(weight, pattern.h, pattern.w)
        weight = untiled(on_grid(own, *fitted(own, 4, own.dtype), 4), pattern.h, pattern.w)
    return weight.to(dtype), mask


def _turns(size: int, device: torch.device) -> int:
    return max(2, -(-ROTATE_BYTES.get(device.type, 1 << 28) // max(size, 1 << 20)))


def _check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise unless y is x Wᵀ to the rounding of its dtype: |error| ≤ 4 eps · Σ |x w| in every entry."""
    exact, room = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bool(((y.double() - exact).abs() > 4 * torch.finfo(y.dtype).eps * room + 1e-30).any()) or not bool(y.isfinite().all()):
        raise GossamerError("a packed product differs from the dense one by more than rounding: not timed")


def of_others() -> float:
    """Return the seconds that all cores together have spent on other processes, as Linux counts them; elsewhere a constant."""
    try:
        user, nice, system, _, _, irq, soft, stolen = Path("/proc/stat").read_text().split()[1:9]
    except (OSError, ValueError):
        return 0.0
    return sum(map(int, (user, nice, system, irq, soft, stolen))) / os.sysconf("SC_CLK_TCK") - time.process_time()


def crowded(others: float, wall: float) -> bool:
    """Whether other processes, which took some seconds of the cores' meanwhile, left too few of them for torch's threads."""
    free = (os.cpu_count() or 1) - torch.get_num_threads()
    return others > 0.1 and others > (free + 0.3) * wall  # less than a tenth of a second is within the count's own error


class Table:
    """The measured products of one device, kept in a JSON file.

    Args:
        device: where products are timed.
        path: the file; by default in `gossamer.models.cache`.
    """

    def __init__(self, device: torch.device | str = "cpu", path: Path | None = None) -> None:
        self.device = torch.device(device)
        self.path = path or cache() / "timings.json"
        here = environment()
        machine = here["accelerator"] if self.device.type == "cuda" else f"{here['cpu']}, {here['threads']} threads"
        self.key = f"{machine}; torch {here['torch']}; gossamer {here['gossamer']}"
        found: dict[str, dict[str, Any]] = self._file().get(self.key, {})
        self.entries = {name: entry for name, entry in found.items() if self._holds(name, entry)}

    def _holds(self, name: str, entry: dict[str, Any]) -> bool:
        """Return whether the kernel that was measured is the one that would run now."""
        layout = FORMATS.get(json.loads(name).get("format")) if name.startswith("{") else None
        return layout is None or entry.get("kernel") == choose("auto", self.device, layout.kernels)

    def _file(self) -> dict[str, Any]:
        found = read_json(self.path) if self.path.exists() else {}
        return found if isinstance(found, dict) else {}

    def __getitem__(self, product: Product) -> dict[str, Any]:
        """Return seconds and bytes of a product, measured now unless it was before."""
        return self.once(json.dumps(asdict(product), sort_keys=True), lambda: measure(product, self.device))

    def once(self, name: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the entry of this name, which is made and kept if it is not there.

        One that was measured while other processes wanted the same cores has a true ``beside``, and is kept as long as this
        table only: in the file it would decide for good.
        """
        if name not in self.entries:
            started, before = time.perf_counter(), of_others()
            found = measured()
            wall, after = time.perf_counter() - started, of_others()
            if self.device.type == "cpu" and crowded(after - before, wall):
                found = {**found, "beside": True}
            self.entries[name] = found
            sound = {k: v for k, v in self.entries.items() if not v.get("beside")}
            write_text(self.path, json.dumps({**self._file(), self.key: sound}, indent=1) + "\n")
        return self.entries[name]

    def missing(self, products: Iterable[Product]) -> list[Product]:
        """Return those that would have to be measured."""
        return [p for p in dict.fromkeys(products) if json.dumps(asdict(p), sort_keys=True) not in self.entries]

    def forget(self) -> int:
        """Forget everything measured on this device; return how many entries there were."""
        count, self.entries = len(self.entries), {}
        if self.path.exists():
            write_text(self.path, json.dumps({k: v for k, v in self._file().items() if k != self.key}, indent=1) + "\n")
        return count
