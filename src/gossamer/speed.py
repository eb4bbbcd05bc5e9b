"""Bench: what the zeros of a model buy on this device, product by product and end to end, dense and sparse in one run."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern
from gossamer.core.report import FORMAT, environment
from gossamer.decode import prefill_seconds, step_seconds
from gossamer.sites._job import pattern_of
from gossamer.sites._rows import describe
from gossamer.sites._walk import targets
from gossamer.sites.packing import pack
from gossamer.sites.weights import bar
from gossamer.timing import Product, Table, candidates, rounded, spec_of

Kinds = Counter[tuple[int, int, str, float]]  # how many weights of each out, in, dtype and (rounded) sparsity
GRID = (0.2, 0.35, 0.5, 0.7, 0.9)  # where the break-even is looked for


def bench(
    model: nn.Module,
    *,
    pattern: str | Pattern | None = None,
    batch: Sequence[int] = (1,),
    context: int = 128,
    prefill: int = 512,
    edges: bool = True,
    table: Table | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure a pruned model dense, pack it in place where that pays, and measure it again.

    Args:
        model: a causal language model with zeros in its weights; packed afterwards, where anything paid.
        pattern: what the zeros follow, as for `gossamer.pack`.
        batch: how many sequences are decoded together; one row each.
        context: tokens each sequence holds while it is decoded.
        prefill: tokens of the prompt whose forward pass is timed.
        edges: look for the sparsity from which each shape is faster, which takes five more measurements a shape.
        table: where products are kept; by default this device's.

    Returns:
        A JSON object of kind "bench": products (a row for each shape, batch and format: dense and sparse seconds, ratio, bytes,
        the byte limit, the implementation that ran), break_even (the sparsity from which a shape is faster, by batch), decode
        and prefill (dense and packed seconds, ratio), bytes, and what `pack` said.

    Raises:
        GossamerError: the model has no zeros.
    """
    device = next(model.parameters()).device
    table = table or Table(device)
    shape = pattern_of(pattern) if pattern is not None else None
    inside = [t for t in targets(model) if not t.stacked]
    kinds = Counter(
        (t.matrices().shape[1], t.matrices().shape[2], str(t.parameter.dtype).removeprefix("torch."), _zeros(t.parameter))
        for t in inside
    )
    if not any(kind[3] for kind in kinds):
        raise GossamerError("there is nothing to bench: the model has no zeros; prune it first")
    products = _products(kinds, shape, batch, table, progress)
    found = _break_even(kinds, batch, table, progress) if edges else []
    dense_bytes = sum(p.nbytes for p in model.parameters())
    dense = {b: step_seconds(model, b, context) for b in batch}
    dense_prefill = prefill_seconds(model, prefill)
    report = pack(model, pattern=shape, batch=batch, table=table, progress=progress)
    packed = any(row["format"] != "dense" for row in report.weights)
    sparse = {b: step_seconds(model, b, context) for b in batch} if packed else dense
    sparse_prefill = prefill_seconds(model, prefill) if packed else dense_prefill
    saved = sum(row["dense_bytes"] - row["bytes"] for row in report.weights)
    return {
        "format": FORMAT,
        "kind": "bench",
        "model": describe(model),
        "environment": environment(),
        "device": str(device),
        "products": products,
        "break_even": found,
        "decode": [{"batch": b, "context": context, **_pair(dense[b], sparse[b])} for b in batch],
        "prefill": {"tokens": prefill, **_pair(dense_prefill, sparse_prefill)},
        "bytes": {"dense": dense_bytes, "packed": dense_bytes - saved},
        "said": report.recipe["said"],
        "weights": report.weights,
    }


def decoding(
    model: nn.Module, pattern: Pattern | None = None, *, batch: int = 1, context: int = 128, progress: bool | None = None
) -> dict[str, Any]:
    """Time a decoding step of a pruned model, dense and then packed where that pays; the model is packed afterwards.

    Returns:
        What a `Report` holds as ``speed``. Where nothing pays the packed step is the dense one.
    """
    dense_bytes = sum(p.nbytes for p in model.parameters())
    dense = step_seconds(model, batch, context)
    report = pack(model, pattern=pattern, batch=(batch,), progress=progress)
    saved = sum(row["dense_bytes"] - row["bytes"] for row in report.weights)
    packed = step_seconds(model, batch, context) if any(row["format"] != "dense" for row in report.weights) else dense
    size = {"dense_bytes": dense_bytes, "bytes": dense_bytes - saved, "said": report.recipe["said"]}
    return {"batch": batch, "context": context, **_pair(dense, packed), **size}


def mask_at_random(model: nn.Module, sparsity: float, pattern: str | Pattern | None = None, seed: int = 0) -> None:
    """Set entries of every linear weight inside the blocks to zero, in place: any at random, or the smallest by a pattern."""
    shape = pattern_of(pattern) if pattern is not None else None
    weights = [t.matrices() for t in targets(model)]
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for weight in weights:
        for part in (part for matrix in weight for part in matrix.split(1024)):  # random numbers take four bytes an entry
            chances = torch.rand(part.shape, generator=generator, device=part.device)
            if shape is None:
                part.masked_fill_(chances < sparsity, 0)
            else:
                part.masked_fill_(~shape.select(chances, sparsity if shape.takes_sparsity else None), 0)


def _zeros(weight: torch.Tensor) -> float:
    return rounded(1 - int(weight.count_nonzero()) / max(weight.numel(), 1))


def _pair(dense: float, packed: float) -> dict[str, float]:
    return {"dense": dense, "packed": packed, "ratio": dense / packed}


def _products(
    kinds: Kinds, pattern: Pattern | None, batch: Sequence[int], table: Table, progress: bool | None
) -> list[dict[str, Any]]:
    rows = []
    names = candidates(pattern, table.device)
    with bar(len(kinds) * len(batch) * len(names), "timing products", progress) as shown:
        for (out, in_, dtype, sparsity), count in kinds.items():
            for b in batch:
                dense = table[Product(out, in_, dtype, b)]
                for name in names if sparsity else ():
                    found = table[Product(out, in_, dtype, b, name, spec_of(pattern), sparsity)]
                    row = {
                        "shape": [out, in_],
                        "count": count,
                        "dtype": dtype,
                        "batch": b,
                        "sparsity": sparsity,
                        "format": name,
                    }
                    row |= {"kernel": found["kernel"], "dense_seconds": dense["seconds"], "seconds": found["seconds"]}
                    row |= {"dense_bytes": dense["bytes"], "bytes": found["bytes"], "limit": dense["bytes"] / found["bytes"]}
                    rows.append({**row, "ratio": dense["seconds"] / found["seconds"]})
                    shown.update()
    return rows


def _break_even(kinds: Kinds, batch: Sequence[int], table: Table, progress: bool | None) -> list[dict[str, Any]]:
    """Return, for each shape and batch, the unstructured sparsity from which the best format is faster; None if none is."""
    shapes = list(dict.fromkeys(kind[:3] for kind in kinds))
    names = candidates(None, table.device)
    rows = []
    with bar(len(shapes) * len(batch) * len(GRID), "looking for the break-even", progress) as shown:
        for out, in_, dtype in shapes:
            for b in batch:
                dense = table[Product(out, in_, dtype, b)]["seconds"]
                ratios = []
                for s in GRID:
                    ratios.append(
                        dense / min(table[Product(out, in_, dtype, b, n, "Unstructured", s)]["seconds"] for n in names)
                    )
                    shown.update()
                rows.append({"shape": [out, in_], "dtype": dtype, "batch": b, "sparsity": _crossing(GRID, ratios)})
    return rows


def _crossing(at: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Return where the ratio passes 1 for good, between two measured points in a straight line.

    >>> _crossing((0.2, 0.4, 0.6), (0.5, 0.9, 1.1))
    0.5
    """
    below = [i for i, ratio in enumerate(ratios) if ratio < 1]
    if not below:
        return at[0]
    last = below[-1]
    if last == len(at) - 1:
        return None
    share = (1 - ratios[last]) / (ratios[last + 1] - ratios[last])
    return round(at[last] + share * (at[last + 1] - at[last]), 3)
