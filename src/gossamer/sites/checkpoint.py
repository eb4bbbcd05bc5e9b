"""Prune from a directory of safetensors to another, one block in memory at a time, and save a pruned model."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gossamer.core.atomic import cannot_write, publish
from gossamer.core.errors import GossamerError
from gossamer.core.format import Format
from gossamer.core.pattern import Pattern
from gossamer.core.report import Report
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Solver
from gossamer.core.stats import INPUTS
from gossamer.formats import Wrapped
from gossamer.models import check_directory, quiet, skeleton
from gossamer.sites._allocated import allocated
from gossamer.sites._bar import bar
from gossamer.sites._calibrate import Batch, Calibration
from gossamer.sites._inputs import calibration_batches, check_batches
from gossamer.sites._job import Job, select_targets, show_method
from gossamer.sites._packed_write import packed_row, sparse_layers, with_products, write_dense, write_packed
from gossamer.sites._pruning import Pruning
from gossamer.sites._recipe import command_of, recipe_of
from gossamer.sites._rows import describe, peak_bytes, phases, row
from gossamer.sites._run import Run, write_sparsity
from gossamer.sites._stream import Checkpoint
from gossamer.sites._visit import blank_stats, own_gradients
from gossamer.sites._walk import Target
from gossamer.sites._walk import targets as find_targets
from gossamer.sites._whole import fill, measured
from gossamer.sites.weights import LANES, approach


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    method: str | Score | Solver | Factorizer,
    pattern: str | Pattern,
    *,
    sparsity: float | None = None,
    allocate: Any = "uniform",
    data: str | Path | None = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    targets: str | None = None,
    device: str | None = None,
    lanes: int = LANES,
    progress: bool | None = None,
    force: bool = False,
    name: str | None = None,
) -> Report:
    """Prune the model in ``source`` into a new directory ``out``.

    One block is in memory at a time, where the method allows it; each finished block is a shard of the result. A run that was
    killed and is started again with the same arguments goes on after the last finished block, to the same bits (`OBERT`, the
    rounds of `SynFlow` and an allocation in work start over). ``out`` appears whole or not at all. Of a method that factorizes
    (`ARMOR`) it is a packed checkpoint.

    Args:
        source: a directory with config.json and safetensors.
        out: where the result goes; it must be empty or absent unless ``force``.
        name: what the report calls the model.
        others: as in `gossamer.prune`.

    Raises:
        GossamerError: anything asked for that cannot be; ``out`` is as it was.
    """
    started = time.perf_counter()
    source, out = Path(source), Path(out)
    job = Job.of(method, pattern, sparsity, allocate)
    check_directory(source)
    check_out(out, source, force)
    structure = skeleton(source)  # names and shapes, before anything is read or written
    select_targets(structure, job, targets, weightless=True)
    cpu = torch.device("cpu")
    batches = calibration_batches(job, data, None, seqlen, samples, sample, seed, lanes, folder=source, device=cpu)
    check_batches(structure, batches)
    recipe = recipe_of(
        job, data=data, seqlen=seqlen, samples=samples, sample=sample, seed=seed, targets=targets, batches=batches
    )
    with Run(out, {"recipe": recipe, "source": identity(source), "data": digest(batches), "lanes": lanes}) as run:
        check_out(out, source, force)  # again: another run may have finished in the meantime
        checkpoint = Checkpoint(source, run.scratch(), structure, whole=not job.blockwise)
        model = checkpoint.model
        chosen = find_targets(model, targets)
        where = None if device is None else torch.device(device)
        loaded = time.perf_counter()
        approach(model, job, chosen, batches, where, progress)
        if "sparsities" not in run.state:
            run.state["sparsities"] = allocated(model, job, chosen, batches, where, progress)
            if job.allocation_needs:
                run.keep()
        sparsities = run.state["sparsities"]
        walk = Calibration(model, batches, job.gather, device=where) if job.gather & INPUTS else None
        if walk is not None:
            walk.outputs = run.inputs(len(walk.outputs))
        whole = measured(model, job.gather, batches, chosen, progress)
        if "grads" in job.gather:  # these come through the pruned blocks before, which are not read back: start over
            run.state |= {"done": 0, "rows": []}
        rows, pruning = run.state["rows"], Pruning(model, job, chosen, sparsities)
        products: dict[Target, Format] = {}  # of the block in hand
        before = run.start()

        with bar(len(chosen), f"{show_method(job.solver)} {job.pattern}", progress) as shown:
            shown.update(len(rows))
            for position, (list_name, index, _) in enumerate(checkpoint):
                if position < run.state["done"]:
                    continue
                inside = [t for t in chosen if t.name.startswith(f"{list_name}.{index}.")]

                products.clear()
                checkpoint.fetch(list_name, index)
                known = whole | own_gradients(model, job.gather, batches, inside)

                def visit(target: Any, stats: Any, known: Any = known) -> None:
                    shown.set_postfix_str(target.name.removesuffix(".weight"), refresh=False)
                    stats = fill(target, stats, known)
                    for done, found, product in pruning.prune(target, stats):
                        rows.append(found)
                        if product is not None:
                            products[done] = product
                        shown.update()

                if walk is not None:
                    with pruning.block(walk, index, inside) as visited:
                        walk.block(index, visited, visit)
                else:
                    for target in inside:
                        visit(target, blank_stats(target, {}))
                state = checkpoint.block_state(list_name, index)
                if job.factorizes:
                    state, said = with_products(state, products, type(model).__name__)
                    run.add_packed(said)
                run.finish_block(position, state, walk.outputs if walk is not None else [])
                checkpoint.drop(list_name, index)
        for target in (t for t in chosen if t.block is None):
            rows.append(job.prune(target, blank_stats(target, whole), sparsities[target.name])[0])

        elapsed = run.seconds()
        spent = {"load": loaded - started, "allocate": before - loaded, **phases(rows, elapsed)}
        report = Report(
            kind="prune",
            recipe={**recipe, "command": command_of(name or str(source), recipe, str(out))},
            model=describe(model, name or str(source)),
            weights=rows,
            seconds={**spent, "total": before - started + elapsed},
            peak_bytes=peak_bytes(),
        )
        run.complete(source, checkpoint.other_state(), report)
        return report


def save(
    model: Any,
    out: str | Path,
    *,
    packed: bool = False,
    report: Report | None = None,
    tokenizer: Any = None,
    force: bool = False,
) -> None:
    """Save a pruned model as an ordinary ``save_pretrained`` directory with a ``sparsity.json`` that counts its zeros.

    Where a method that factorizes (`ARMOR`) has put products in the place of weights, these are multiplied out: the directory
    is ordinary and dense, and these weights have no zeros; ``packed=True`` keeps the factors.

    Args:
        model: a transformers model.
        out: the directory; it must be empty or absent unless ``force``, and appears whole or not at all.
        packed: leave the zeros out: weights that `gossamer.pack` has packed are written as they are (`Sliced` and `Tiled` as
            `Bitmask`); of a model without such, every target whose zeros save bytes, as `Bitmask`. `gossamer.load` opens it.
        report: kept as ``report.json`` beside it.
        tokenizer: saved along, where given.

    Raises:
        GossamerError: ``out`` is in use, or cannot be written; nothing can be packed, or something is, and ``packed`` is False.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(LlamaForCausalLM(tiny), folder + "/out")
    ...     sorted(path.name for path in Path(folder, "out").iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors', 'sparsity.json']
    """
    layers = sparse_layers(model)
    multiplied = bool(layers) and not packed and all(isinstance(layer.packed, Wrapped) for layer in layers.values())
    if layers and not packed and not multiplied:
        raise GossamerError(
            "the model holds packed weights: save it with packed=True, or make it dense with gossamer.unpack(model)"
        )
    with _appearing(out, None, force) as temporary:
        rows = [packed_row(name, layer) for name, layer in layers.items()]
        rows = rows or [row(target) for target in find_targets(model)]
        if packed:
            write_packed(model, temporary)
        elif multiplied:
            factors = temporary / "factors"
            factors.mkdir()
            write_packed(model, factors)
            rows = write_dense(factors, temporary)
            shutil.rmtree(factors)
        with quiet():
            if not layers and not packed:
                model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        write_sparsity(temporary, (report.weights if report and not multiplied else None) or rows)
        if report is not None:
            report.save(temporary / "report.json")


def unpack_checkpoint(source: str | Path, out: str | Path, *, force: bool = False) -> None:
    """Write a packed checkpoint as the ordinary dense one that it is, to the bit, with the files beside it; nothing is built.

    Products (`Wrapped`) are multiplied out: their weights have no zeros then, and the new ``sparsity.json`` says so.

    Args:
        source: a directory from ``gossamer.save(model, source, packed=True)``.
        out: where the dense one goes; it must be empty or absent unless ``force``, and appears whole or not at all.

    Raises:
        GossamerError: ``source`` is not packed, or is damaged; ``out`` is in use, or cannot be written.

    >>> import tempfile, gossamer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> pruned = LlamaForCausalLM(tiny)
    >>> report = gossamer.prune(pruned, "Magnitude", "Unstructured", sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(pruned, folder + "/packed", packed=True)
    ...     unpack_checkpoint(folder + "/packed", folder + "/dense")
    ...     again = LlamaForCausalLM.from_pretrained(folder + "/dense")
    >>> all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters()))
    True
    """
    source = Path(source)
    with _appearing(out, source, force) as temporary:
        if rows := write_dense(source, temporary):
            write_sparsity(temporary, rows)


@contextmanager
def _appearing(out: str | Path, source: Path | None, force: bool) -> Iterator[Path]:
    """Yield a folder that takes the place of ``out`` when all has gone well; nothing of it is left otherwise."""
    target = check_out(Path(out), source, force)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, target)
    except OSError as error:
        raise cannot_write(Path(out), error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path, source: Path | None, force: bool) -> Path:
    """Return the directory that a result for ``out`` goes to, links followed; raise unless it may be written."""
    target = Path(os.path.realpath(out))
    if source is not None and (model := Path(os.path.realpath(source))).is_relative_to(target):
        told = "is the model itself" if model == target else f"holds the model {source}"
        raise GossamerError(f"the output {out} {told}; give another directory")
    if target.exists() and not target.is_dir():
        raise GossamerError(f"the output {out} is a file; give a directory")
    if Path.cwd().is_relative_to(target):  # it would be replaced under the feet of the shell
        raise GossamerError(f"the output {out} is the directory you are in, or holds it; give one of its own")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise GossamerError(f"the output directory {out} is not empty; give another, or --force to replace it")
    return target


def identity(source: Path) -> list[Any]:
    """Return what tells one state of a directory from another without reading its weights."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.iterdir()) if f.is_file()]


def digest(batches: Sequence[Batch]) -> str:
    """Return what tells one sequence of batches from another."""
    found = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            found.update(batch[key].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
