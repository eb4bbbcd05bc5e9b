"""The commands about packed models and speed: bench, plan, generate, timings, unpack."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table as Drawn

from gossamer.cli._shared import (
    Device,
    Force,
    Json,
    Quiet,
    app,
    check_file,
    device_of,
    err,
    fractions,
    out,
    progress_of,
    show,
    speaker,
    split,
    write,
)  # fmt: skip
from gossamer.core.errors import GossamerError
from gossamer.shapes import SHAPES

KNOWN = ", ".join(SHAPES)
Batch = Annotated[str, typer.Option(metavar="LIST", help="sequences decoded together, separated by commas")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the model's own by default")]
Shape = Annotated[
    str | None,
    typer.Option("--config", metavar="SHAPE", help=f"random weights instead: {KNOWN}, config.json"),
]


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="a pruned model")] = None,
    shape: Shape = None,
    sparsity: Annotated[str, typer.Option(metavar="LIST", help="of the random weights")] = "0.5,0.7,0.9",
    pattern: Annotated[
        str | None, typer.Option(metavar="SPEC", help="what the zeros follow: 2:4, 4x1; unstructured if left out")
    ] = None,
    batch: Batch = "1",
    context: Annotated[int, typer.Option(min=1, help="tokens a sequence holds while it is decoded")] = 128,
    prompt: Annotated[
        int, typer.Option(min=1, help="tokens of the prompt that is timed; fewer where that takes minutes")
    ] = 512,
    edges: Annotated[bool, typer.Option(help="look for the sparsity from which each shape is faster")] = True,
    dtype: Dtype = None,
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure decoding and prefill, dense and packed, in one run: every product, and the model as a whole."""
    from gossamer.models import causal_lm, resolve
    from gossamer.shapes import config_of, random_model
    from gossamer.speed import bench as run
    from gossamer.speed import mask_at_random

    if (model is None) == (shape is None):
        raise GossamerError("bench wants a model, or --config for random weights, and not both")
    where, batches = device_of(device) or "cpu", _counts(batch)
    check_file(to_json)
    kind = _dtype(dtype)
    documents: list[dict[str, Any]] = []
    how: dict[str, Any] = {"pattern": pattern, "batch": batches, "context": context, "prefill": prompt, "edges": edges}
    if model is not None:
        loaded = causal_lm(resolve(model, say=speaker(quiet)), kind or "auto", where)
        documents.append(run(loaded, **how, progress=progress_of(quiet)))
    else:
        config = config_of(shape)  # type: ignore[arg-type]
        for fraction in fractions(sparsity):
            speaker(quiet)(f"{shape}, random weights, sparsity {fraction:g}")
            random = random_model(config, kind or _bfloat16(), where)
            mask_at_random(random, fraction, pattern)
            documents.append(run(random, **how, progress=progress_of(quiet)))
            del random
    for document in documents:
        print_bench(document)
    write(to_json, documents[0] if len(documents) == 1 else {"format": 1, "kind": "benches", "runs": documents})


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL|config.json", help=f"a model, its config.json, or {KNOWN}")],
    pattern: Annotated[str, typer.Option(metavar="SPECS", help="separated by ';'")] = "Unstructured;2:4",
    sparsity: Annotated[
        str, typer.Option(metavar="LIST", help="fractions of zeros, separated by commas")
    ] = "0.5,0.6,0.7,0.8,0.9",
    batch: Annotated[int, typer.Option(help="sequences decoded together")] = 1,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    to_json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Say, before anything is pruned, what each sparsity would bring on this device: bytes and tokens per second."""
    from gossamer.forecast import plan as run
    from gossamer.models import resolve
    from gossamer.shapes import config_of

    check_file(to_json)
    where = device_of(device) or "cpu"
    kind = str(_dtype(dtype) or "bfloat16").removeprefix("torch.")
    source = model if model in SHAPES or Path(model).exists() else resolve(model, say=speaker(quiet))
    config = config_of(source)
    speaker(quiet)(f"timing the products of {model} on {where}, once; what is known already is kept")
    found = run(
        config, patterns=split(pattern, ";"), sparsities=fractions(sparsity), batch=batch, dtype=kind, device=where,
        progress=progress_of(quiet),
    )  # fmt: skip
    dense = found["dense"]
    table = Drawn("pattern", "sparsity", "GB", "tokens/s", "× dense", "does it pay here?")
    table.add_row("dense", "–", f"{dense['bytes'] / 1e9:.2f}", f"{dense['tokens_per_second']:.2f}", "1.00", "–")
    for row in found["rows"]:
        formats = ", ".join(sorted({name for name in row["formats"].values() if name != "dense"}))
        cells = [row["pattern"], f"{row['sparsity']:g}", f"{row['bytes'] / 1e9:.2f}", f"{row['tokens_per_second']:.2f}"]
        table.add_row(
            *cells, f"{row['ratio']:.2f}", f"yes, as {formats}" if row["pays"] else "no: every weight is faster dense"
        )
    show(table)
    write(to_json, {"model": model, **found})


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a directory, packed or dense, a Hugging Face id, or smollm2")],
    prompt: Annotated[str, typer.Option(help="the text to go on from")],
    tokens: Annotated[int, typer.Option(help="how many to write at most")] = 64,
    packed: Annotated[bool, typer.Option("--pack", help="pack what pays here before writing")] = False,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Write on from a prompt, greedily, with a static cache."""
    import time

    from gossamer.decode import greedy
    from gossamer.models import causal_lm, resolve, tokenizer
    from gossamer.sites.packing import pack

    if tokens < 1:
        raise GossamerError(f"--tokens is a positive number; got {tokens}")
    if not prompt:
        raise GossamerError("the prompt is empty; give some text")
    path = resolve(model, say=speaker(quiet))
    words = tokenizer(path)
    ids = words(prompt, return_tensors="pt")["input_ids"]
    loaded = causal_lm(path, _dtype(dtype) or "auto", device_of(device))
    if packed:
        speaker(quiet)(str(pack(loaded, progress=progress_of(quiet)).recipe["said"]))
    stop = loaded.generation_config.eos_token_id
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    written: list[int] = []
    started = time.perf_counter()
    shown = ""
    for token, _ in greedy(loaded, ids.to(loaded.device), tokens, stops):
        written.append(token)
        text = words.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several tokens is not whole yet
            out.print(text[len(shown) :], end="")
            shown = text
    out.print()
    if not quiet:
        err.print(f"{len(written)} tokens, {len(written) / (time.perf_counter() - started):.1f} a second, the prompt included")


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(metavar="DIR", help="a packed model's directory")],
    to: Annotated[Path, typer.Option("--out", metavar="DENSE", help="the dense model's directory")],
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write a packed model as the ordinary dense one that it is, to the bit."""
    from gossamer.sites.checkpoint import unpack_checkpoint

    unpack_checkpoint(packed, to, force=force)
    if not quiet:
        out.print(f"wrote {to}")


@app.command()
def timings(
    forget: Annotated[bool, typer.Option("--forget", help="forget what was measured on this device")] = False,
    device: Device = None,
) -> None:
    """Show the products measured on this device, or forget them."""
    import json

    from gossamer.timing import Table

    table = Table(device_of(device) or "cpu")
    if forget:
        out.print(f"forgot {table.forget()} entries of {table.key}")
        return
    out.print(f"{table.key}: {len(table.entries)} entries in {table.path}")
    drawn = Drawn("product", "dtype", "batch", "format", "pattern", "sparsity", "µs", "MB", "kernel")
    for name, found in sorted(table.entries.items()):
        entry = json.loads(name)
        if "out" in entry:
            cells = [f"{entry['out']}x{entry['in_']}", entry["dtype"], str(entry["batch"]), entry["format"], entry["pattern"]]
            last = [f"{entry['sparsity']:g}", f"{found['seconds'] * 1e6:.1f}", f"{found['bytes'] / 1e6:.2f}", found["kernel"]]
            drawn.add_row(*cells, *last)
    show(drawn)


def print_bench(document: dict[str, Any]) -> None:
    table = Drawn("shape", "×", "batch", "sparsity", "format", "kernel", "dense µs", "sparse µs", "ratio", "byte limit", "MB")
    for row in document["products"]:
        table.add_row(
            "x".join(map(str, row["shape"])),
            str(row["count"]),
            str(row["batch"]),
            f"{row['sparsity']:g}",
            row["format"],
            row["kernel"],
            f"{row['dense_seconds'] * 1e6:.1f}",
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['limit']:.2f}",
            f"{row['dense_bytes'] / 1e6:.1f} → {row['bytes'] / 1e6:.1f}",
        )
    show(table)
    edges = Drawn("shape", "batch", "faster from a sparsity of")
    for row in document["break_even"]:
        edge = "never, up to 0.9" if row["sparsity"] is None else f"{row['sparsity']:g}"
        edges.add_row("x".join(map(str, row["shape"])), str(row["batch"]), edge)
    if document["break_even"]:
        show(edges)
    whole = Drawn("model", "dense", "packed", "ratio")
    for row in document["decode"]:
        speeds = [f"{row['batch'] / row[k]:.2f} tokens/s" for k in ("dense", "packed")]
        whole.add_row(f"decode, batch {row['batch']}", *speeds, f"{row['ratio']:.2f}")
    row = document["prefill"]
    whole.add_row(f"prefill of {row['tokens']}", f"{row['dense']:.3f} s", f"{row['packed']:.3f} s", f"{row['ratio']:.2f}")
    size = document["bytes"]
    whole.add_row("memory", *(f"{size[k] / 1e6:.0f} MB" for k in ("dense", "packed")), f"{size['dense'] / size['packed']:.2f}")
    show(whole)
    out.print(document["said"])


def _counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in split(text, ",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise GossamerError(f"--batch wants positive numbers separated by commas, such as 1,8; got {text!r}")
    return found


def _dtype(name: str | None) -> Any:
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is not None and name not in known:
        raise GossamerError(f"--dtype is {', '.join(known)}; got {name!r}")
    return known.get(name) if name else None


def _bfloat16() -> Any:
    import torch

    return torch.bfloat16
