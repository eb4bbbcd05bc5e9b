"""Pack: swap linears for sparse ones where that is measured to pay on this device, and swap them back."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gossamer.core.errors import GossamerError
from gossamer.core.format import Format
from gossamer.core.pattern import Pattern
from gossamer.core.report import Report
from gossamer.kernels._choice import NAMES, choose
from gossamer.sites._job import pattern_of
from gossamer.sites._rows import describe, peak_bytes
from gossamer.sites._sparse_linear import SparseLinear
from gossamer.sites._swap import swap_in
from gossamer.sites._walk import Target
from gossamer.sites._walk import targets as find_targets
from gossamer.sites.weights import bar
from gossamer.timing import FORMATS, Product, Table, candidates, rounded, spec_of

LEAST = 0.05  # weights with fewer zeros than this are not looked at


@dataclass(frozen=True)
class Verdict:
    """What one weight becomes: a format, or None for dense; the measured ratio dense/sparse by batch; and why."""

    format: str | None
    ratios: dict[int, float]
    why: str


def pack(
    model: nn.Module,
    format: str | None = None,
    *,
    pattern: str | Pattern | None = None,
    batch: Sequence[int] = (1,),
    kernel: str = "auto",
    targets: str | None = None,
    table: Table | None = None,
    progress: bool | None = None,
) -> Report:
    """Swap a pruned model's linears for `SparseLinear` where that is faster here, in place.

    Each distinct shape, dtype and sparsity is timed once on this device, dense and in each format, at every batch size named;
    a linear becomes sparse if some format is faster at all of them, and takes the one with the best mean ratio.

    Args:
        model: a transformers model with zeros in its weights.
        format: "Bitmask", "NM", "Block", "Grouped", "Sliced" or "Tiled" forces one, without timing; None lets the measurements
            decide, among those that fit any values.
        pattern: what the zeros follow ("2:4", "4x1", "1x16"), for the formats that use it; unstructured by default.
        batch: how many tokens at a time the model will run on.
        kernel: an implementation by name; "auto" takes the fastest there is.
        targets: which weights, by name or glob; by default every linear inside the blocks.
        table: where measurements are kept; by default this device's.
        progress: show a bar while measuring; by default only on a terminal.

    Returns:
        A `Report` of kind "pack": for each weight its format, bytes and measured ratios, and why it stayed dense where it did.

    Raises:
        GossamerError: no weight has zeros, a format or kernel that cannot be; the model is unchanged.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import gossamer
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> model = LlamaForCausalLM(tiny)
    >>> report = gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    >>> report = pack(model, "Bitmask")
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'SparseLinear'
    """
    started = time.perf_counter()
    shape = pattern_of(pattern) if pattern is not None else None
    if format is not None and format not in FORMATS:
        raise GossamerError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    chosen = [t for t in find_targets(model, targets) if not t.stacked and t.block is not None]
    zeros = {t.name: 1 - int(t.parameter.count_nonzero()) / max(t.parameter.numel(), 1) for t in chosen}
    if max(zeros.values(), default=0.0) < LEAST:
        most = max(zeros.values(), default=0.0)
        raise GossamerError(f"there is nothing to pack: no weight has more than {most:.1%} zeros; prune the model first")
    device = chosen[0].parameter.device
    choose(kernel, device, FORMATS[format].kernels if format else NAMES)
    if format is None:
        verdicts = _judge(chosen, zeros, shape, batch, table or Table(device), progress)
    else:
        forced = Verdict(format, {}, "asked for")
        dense = Verdict(None, {}, "it has no zeros")
        verdicts = {t.name: forced if zeros[t.name] >= LEAST else dense for t in chosen}
    # Everything is packed before anything is swapped, so that a weight that cannot be packed leaves the model as it was.
    packed = {t.name: _packed(t, verdicts[t.name].format, shape) for t in chosen if verdicts[t.name].format}
    rows = []
    for target in chosen:
        rows.append(_row(target, verdicts[target.name], packed.get(target.name), zeros[target.name], kernel))
        if target.name in packed:
            swap_in(model, {target: packed.pop(target.name)}, kernel)
    return Report(
        kind="pack",
        recipe={
            "format": format,
            "pattern": spec_of(shape),
            "batch": list(batch),
            "kernel": kernel,
            **_said(rows),
        },
        model=describe(model),
        weights=rows,
        seconds={"total": time.perf_counter() - started},
        peak_bytes=peak_bytes(),
    )


def unpack(model: nn.Module) -> int:
    """Make every packed linear of a model dense again, in place; return how many there were.

    >>> unpack(nn.Sequential(nn.Linear(2, 2)))
    0
    """
    from transformers.pytorch_utils import Conv1D

    found = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for name, module in found.items():
        dense = module.packed.dense()
        out, in_ = dense.shape
        plain: Any = Conv1D(out, in_) if module.transposed else nn.Linear(in_, out, bias=False, device="meta")
        if module.transposed:
            dense = dense.T.contiguous()
        plain.weight, plain.bias = nn.Parameter(dense, requires_grad=False), module.bias
        plain.train(module.training)
        model.set_submodule(name, plain)
    if found and hasattr(model, "save_pretrained"):
        from gossamer.hf import unmark

        unmark(model)
    return len(found)


def _judge(
    chosen: Sequence[Target],
    zeros: dict[str, float],
    pattern: Pattern | None,
    batch: Sequence[int],
    table: Table,
    progress: bool | None,
) -> dict[str, Verdict]:
    """Decide for each weight, by the measured products of its shape, dtype and sparsity."""
    names = candidates(pattern, table.device)
    spec = spec_of(pattern)

    def products(target: Target, name: str) -> list[Product]:
        out, in_ = target.matrices().shape[1:]
        dtype = str(target.parameter.dtype).removeprefix("torch.")
        how = {} if name == "dense" else {"format": name, "pattern": spec, "sparsity": rounded(zeros[target.name])}
        return [Product(out, in_, dtype, b, **how) for b in batch]  # type: ignore[arg-type]

    worth = [t for t in chosen if rounded(zeros[t.name]) > 0]
    missing = table.missing(p for t in worth for name in ("dense", *names) for p in products(t, name))
    with bar(len(missing), "timing products", progress) as shown:
        for product in missing:
            shown.set_postfix_str(f"{product.out}x{product.in_} {product.format} batch {product.batch}", refresh=False)
            table[product]
            shown.update()
    verdicts = {t.name: Verdict(None, {}, "it has no zeros") for t in chosen}
    for target in worth:
        dense = [table[p]["seconds"] for p in products(target, "dense")]
        ratios = {name: [d / table[p]["seconds"] for d, p in zip(dense, products(target, name), strict=True)] for name in names}
        best = max(ratios, key=lambda name: (min(ratios[name]) > 1, statistics.geometric_mean(ratios[name])))
        by_batch = dict(zip(batch, ratios[best], strict=True))
        told = ", ".join(f"{r:.2f}x at batch {b}" for b, r in by_batch.items())
        if any(table[p].get("beside") for name in ("dense", best) for p in products(target, name)):
            told += ", beside other work on this machine: it will be measured again"
        pays = min(ratios[best]) > 1
        verdicts[target.name] = Verdict(best if pays else None, by_batch, f"{best} measured {told}")
    return verdicts


def _packed(target: Target, format: str | None, pattern: Pattern | None) -> Format:
    assert format is not None
    try:
        return FORMATS[format].pack(target.matrices()[0], None, pattern)
    except GossamerError as error:
        raise GossamerError(f"{target.name}: {error}") from error


def _row(target: Target, verdict: Verdict, packed: Format | None, sparsity: float, kernel: str) -> dict[str, Any]:
    w = target.parameter
    row = {
        "name": target.name,
        "shape": list(w.shape),
        "sparsity": sparsity,
        "nnz": int(w.count_nonzero()),
        "block": target.block,
        "format": verdict.format or "dense",
        "kernel": choose(kernel, w.device, packed.kernels) if packed else "torch",
        "bytes": packed.bytes if packed else w.nbytes,
        "dense_bytes": w.nbytes,
        "why": verdict.why,
    }
    if verdict.ratios:
        row["ratios"] = {str(b): r for b, r in verdict.ratios.items()}
    return row


def _said(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Say in one sentence what became of the model."""
    sparse = [r for r in rows if r["format"] != "dense"]
    if not sparse:
        best = max(rows, key=lambda r: max(r.get("ratios", {"": 0.0}).values()))
        return {"said": f"nothing was packed, the model stays dense: the best weight was {best['why']}"}
    return {"said": f"{len(sparse)} of {len(rows)} weights packed"}
