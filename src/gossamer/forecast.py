"""Plan: will it pay here? Bytes and tokens per second of a model at each sparsity, before anything is pruned."""

import json
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from gossamer.core.report import FORMAT, environment
from gossamer.decode import step_seconds
from gossamer.shapes import random_model
from gossamer.sites._job import pattern_of
from gossamer.sites._walk import targets
from gossamer.sites.weights import bar
from gossamer.timing import Product, Table, candidates

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
CONTEXT = 128


def plan(
    config: "PretrainedConfig",
    *,
    patterns: Sequence[str] = ("Unstructured", "2:4"),
    sparsities: Sequence[float] = SPARSITIES,
    batch: int = 1,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    table: Table | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Predict decoding speed and size of a model from its configuration and this device's measured products.

    A dense step takes t₁ + (L − 1)·(t₂ − t₁), t₁ and t₂ measured on the same model with one and two of its L blocks; a sparse
    one takes, for each linear inside the blocks, what its packed product takes in place of what its dense one takes, where
    that is less. Nothing is pruned; what had to be measured is kept in the table.

    Args:
        config: of a causal language model.
        patterns: a pattern that fixes its sparsity gives one row, the others one for each of ``sparsities``.
        batch: sequences decoded together.
        dtype, device: as the model will run.
        table: where measurements are kept; by default this device's.

    Returns:
        A JSON object of kind "plan": dense (bytes, seconds, tokens_per_second) and rows, each with pattern, sparsity, bytes,
        seconds, tokens_per_second, ratio, pays, and the format of each shape.
    """
    where = torch.device(device)
    table = table or Table(where)
    blocks, other = _shapes(config, dtype)
    wanted = [
        (pattern, s)
        for pattern in patterns
        for s in map(pattern_of(pattern).resolve, sparsities if pattern_of(pattern).takes_sparsity else [None])
    ]
    needed = [Product(*shape, dtype, batch) for shape in blocks]
    needed += [
        _product(shape, dtype, batch, name, *how) for how in wanted for shape in blocks for name in _names(how[0], where)
    ]
    missing = table.missing(needed)
    with bar(len(missing) + 2, "timing products", progress) as shown:
        for product in missing:
            shown.set_postfix_str(f"{product.out}x{product.in_} {product.format} {product.sparsity}", refresh=False)
            table[product]
            shown.update()
        dense_seconds = _dense_step(config, dtype, where, batch, table, shown)
    dense_of = {shape: table[Product(*shape, dtype, batch)] for shape in blocks}
    dense_bytes = other + sum(count * int(dense_of[shape]["bytes"]) for shape, count in blocks.items())
    rows = []
    for pattern, sparsity in wanted:
        best: dict[tuple[int, int], tuple[str, dict[str, float]]] = {}
        for shape in blocks:
            tried = {n: table[_product(shape, dtype, batch, n, pattern, sparsity)] for n in _names(pattern, where)}
            tried["dense"] = dense_of[shape]
            best[shape] = min(tried.items(), key=lambda item: item[1]["seconds"])
        saved = sum(c * (dense_of[shape]["seconds"] - best[shape][1]["seconds"]) for shape, c in blocks.items())
        size = other + sum(c * int(best[shape][1]["bytes"]) for shape, c in blocks.items())
        seconds = dense_seconds - saved
        rows.append(
            {
                "pattern": pattern,
                "sparsity": sparsity,
                "bytes": size,
                "seconds": seconds,
                "tokens_per_second": batch / seconds,
                "ratio": dense_seconds / seconds,
                "pays": any(name != "dense" for name, _ in best.values()),
                "formats": {f"{out}x{in_}": name for (out, in_), (name, _) in best.items()},
            }
        )
    return {
        "format": FORMAT,
        "kind": "plan",
        "batch": batch,
        "dtype": dtype,
        "device": str(where),
        "environment": environment(),
        "dense": {"bytes": dense_bytes, "seconds": dense_seconds, "tokens_per_second": batch / dense_seconds},
        "rows": rows,
    }


def _names(pattern: str, device: torch.device) -> list[str]:
    return candidates(pattern_of(pattern), device)


def _product(shape: tuple[int, int], dtype: str, batch: int, name: str, pattern: str, sparsity: float | None) -> Product:
    return Product(*shape, dtype, batch, name, pattern, float(sparsity or 0))


def _shapes(config: "PretrainedConfig", dtype: str) -> tuple[Counter[tuple[int, int]], int]:
    """Return how many linears of each shape (out, in) the blocks hold, and the bytes of everything else."""
    model = random_model(config, getattr(torch, dtype), "meta")
    inside = [t for t in targets(model) if not t.stacked]
    shapes = Counter((t.matrices().shape[1], t.matrices().shape[2]) for t in inside)
    own = {t.parameter.data_ptr() if not t.parameter.is_meta else id(t.module): t for t in inside}
    linear = sum(t.parameter.nbytes for t in own.values())
    return shapes, sum(p.nbytes for p in model.parameters()) - linear


def _dense_step(config: "PretrainedConfig", dtype: str, device: torch.device, batch: int, table: Table, shown: Any) -> float:
    """Return the time of one dense decoding step, from the measured ones of one and of two blocks."""
    known = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}

    def measured(blocks: int) -> float:
        short = deepcopy(config)
        text = short.get_text_config()
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
        text.num_hidden_layers = blocks
        name = json.dumps({"step": blocks, "batch": batch, "dtype": dtype, "context": CONTEXT, "config": known}, default=str)

        def once() -> dict[str, float]:
            return {"seconds": step_seconds(random_model(short, getattr(torch, dtype), device), batch, CONTEXT)}

        found = table.once(name, once)["seconds"]
        shown.update()
        return found

    one, two = measured(1), measured(2)
    return one + (config.get_text_config().num_hidden_layers - 1) * max(two - one, 0.0)
