"""Prune from a directory of safetensors to another, one block in memory at a time, and save a pruned model."""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core.atomic import cannot_write, publish, replacing, write_text
from gossamer.core.errors import GossamerError
from gossamer.core.report import Report, environment, read_json
from gossamer.load import INDEX, check_directory
from gossamer.sites._calibrate import Batch, Calibration, gradients
from gossamer.sites._inputs import calibration_batches
from gossamer.sites._job import Job, command_of, recipe_of, select_targets, show_method
from gossamer.sites._rows import describe, peak_bytes, phases, row
from gossamer.sites._stream import Checkpoint, skeleton_of
from gossamer.sites._walk import targets as find_targets
from gossamer.sites.weights import LANES, allocated, bar, blank_stats

REST_SHARD_BYTES = 2**31


def prune_checkpoint(
    source: Path,
    out: Path,
    method: str,
    pattern: str,
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
    killed and is started again with the same arguments goes on after the last finished block, to the same bits. ``out`` appears
    whole or not at all.

    Args:
        source: a directory with config.json and safetensors.
        out: where the result goes; it must be empty or absent unless ``force``.
        name: what the report calls the model.
        others: as in `gossamer.prune`.

    Raises:
        GossamerError: anything asked for that cannot be; ``out`` is as it was.
    """
    started = time.perf_counter()
    job = Job.of(method, pattern, sparsity, allocate)
    check_directory(source)
    check_out(out, source, force)
    select_targets(skeleton_of(source), job, targets, weightless=True)  # names and shapes, before anything is read or written
    cpu = torch.device("cpu")
    batches = calibration_batches(job, data, None, seqlen, samples, sample, seed, lanes, folder=source, device=cpu)
    recipe = recipe_of(
        job, data=data, seqlen=seqlen, samples=samples, sample=sample, seed=seed, targets=targets, batches=batches
    )
    run = _Run(out, {"recipe": recipe, "source": _identity(source), "data": _digest(batches), "lanes": lanes})
    checkpoint = Checkpoint(source, run.scratch(), whole=not job.blockwise)
    model = checkpoint.model
    chosen = find_targets(model, targets)
    where = None if device is None else torch.device(device)

    if "sparsities" not in run.state:
        run.state["sparsities"] = allocated(model, job, chosen, batches, where, progress)
    sparsities = run.state["sparsities"]
    calibrates = bool(job.gather & {"norm", "gram"})
    walk = Calibration(model, batches, gram="gram" in job.gather, device=where) if calibrates else None
    if walk is not None:
        walk.outputs = run.inputs(len(batches))
    grads = gradients(model, batches, chosen) if "grad" in job.gather else {}
    rows = run.state["rows"]
    before = time.perf_counter()

    with bar(len(chosen), f"{show_method(job.solver)} {job.pattern}", progress) as shown:
        shown.update(len(rows))
        for position, (list_name, index, _) in enumerate(checkpoint):
            if position < run.state["done"]:
                continue
            inside = [t for t in chosen if t.name.startswith(f"{list_name}.{index}.")]

            def visit(target: Any, stats: Any) -> None:
                shown.set_postfix_str(target.name.removesuffix(".weight"), refresh=False)
                rows.append(job.prune(target, stats, sparsities[target.name]))
                shown.update()

            checkpoint.fetch(list_name, index)
            if walk is not None:
                walk.block(index, inside, visit)
            else:
                for target in inside:
                    visit(target, blank_stats(target, grads.pop(target.name, None)))
            run.finish_block(position, checkpoint.block_state(list_name, index), walk.outputs if walk is not None else [])
            checkpoint.drop(list_name, index)
    for target in (t for t in chosen if t.block is None):
        rows.append(job.prune(target, blank_stats(target), sparsities[target.name]))

    elapsed = time.perf_counter() - before + run.state["seconds"]
    report = Report(
        kind="prune",
        recipe={**recipe, "command": command_of(name or str(source), recipe, str(out))},
        model=describe(model, name or str(source)),
        weights=rows,
        seconds={"allocate": before - started, **phases(rows, elapsed), "total": before - started + elapsed},
        peak_bytes=peak_bytes(),
    )
    run.complete(source, checkpoint.other_state(), report)
    return report


def save(model: Any, out: str | Path, *, report: Report | None = None, tokenizer: Any = None, force: bool = False) -> None:
    """Save a pruned model as an ordinary ``save_pretrained`` directory with a ``sparsity.json`` that counts its zeros.

    Args:
        model: a transformers model.
        out: the directory; it must be empty or absent unless ``force``, and appears whole or not at all.
        report: kept as ``report.json`` beside it.
        tokenizer: saved along, where given.

    Raises:
        GossamerError: ``out`` is in use, or cannot be written.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(LlamaForCausalLM(tiny), folder + "/out")
    ...     sorted(path.name for path in Path(folder, "out").iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors', 'sparsity.json']
    """
    from gossamer.load import quiet

    out = Path(out)
    check_out(out, None, force)
    temporary = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with quiet():
            model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        _write_sparsity(temporary, report.weights if report else [row(target) for target in find_targets(model)])
        if report is not None:
            report.save(temporary / "report.json")
        publish(temporary, out.absolute())
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Run:
    """What a run has finished so far, in a folder beside its output: shards, the next block's inputs, and state.json."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out = out.absolute()
        self.folder = self.out.with_name(f".{out.name}.partial")
        versions = {k: environment()[k] for k in ("gossamer", "torch", "threads")}
        digest = hashlib.sha256(json.dumps([identity, versions], sort_keys=True, default=str).encode()).hexdigest()
        self.state: dict[str, Any] = {"identity": digest, "done": 0, "rows": [], "seconds": 0.0, "shards": {}}
        self._started = time.perf_counter()
        try:
            if (self.folder / "state.json").exists():
                kept = read_json(self.folder / "state.json")
                if kept.get("identity") == digest:
                    self.state = kept
                    return
            shutil.rmtree(self.folder, ignore_errors=True)  # another command's remains
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(self.out, error) from error

    def scratch(self) -> Path:
        """Return an empty folder for converted weights."""
        folder = self.folder / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def inputs(self, lanes: int) -> list[Any]:
        """Return what each lane had put out of the last finished block; None for each before the first."""
        if not self.state["done"]:
            return [None] * lanes
        with safe_open(self.folder / f"inputs-{self.state['done']}.safetensors", framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
        return [_unflatten(found, lane, self.state["output_lengths"][lane]) for lane in range(lanes)]

    def finish_block(self, position: int, state: dict[str, Tensor], outputs: Sequence[Any]) -> None:
        """Write a block's shard and the next block's inputs, then say so in state.json: in that order, each atomically."""
        done = position + 1
        self._shard(f"block-{done:05d}", state)
        if outputs:
            flat = {f"{lane}.{i}": t for lane, out in enumerate(outputs) for i, t in enumerate(_parts(out)) if t is not None}
            _save(self.folder / f"inputs-{done}.safetensors", flat)
            self.state["output_lengths"] = [len(out) if isinstance(out, tuple) else None for out in outputs]
        now = time.perf_counter()
        self.state |= {"done": done, "seconds": self.state["seconds"] + now - self._started}
        self._started = now
        write_text(self.folder / "state.json", json.dumps(self.state))
        (self.folder / f"inputs-{position}.safetensors").unlink(missing_ok=True)

    def complete(self, source: Path, rest: dict[str, Tensor], report: Report) -> None:
        """Write what is outside the blocks, name the shards, copy configuration and tokenizer, and publish the directory."""
        try:
            part: dict[str, Tensor] = {}
            parts = [part]
            for name, tensor in rest.items():
                if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > REST_SHARD_BYTES:
                    parts.append(part := {})
                part[name] = tensor
            for number, part in enumerate(parts):
                self._shard(f"rest-{number:05d}", part)
            finished = self.folder / "finished"
            shutil.rmtree(finished, ignore_errors=True)
            finished.mkdir()
            weight_map: dict[str, str] = {}
            total = 0
            for number, (shard, names) in enumerate(sorted(self.state["shards"].items()), 1):
                file = f"model-{number:05d}-of-{len(self.state['shards']):05d}.safetensors"
                _place(self.folder / f"{shard}.safetensors", finished / file)
                weight_map |= dict.fromkeys(names["names"], file)
                total += names["bytes"]
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(finished / INDEX, json.dumps(index, indent=1) + "\n")
            for kept in source.iterdir():
                if kept.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and kept.name not in (INDEX, *_OURS):
                    shutil.copyfile(kept, finished / kept.name)
            _write_sparsity(finished, report.weights)
            report.save(finished / "report.json")
            publish(finished, self.out)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shard(self, name: str, state: dict[str, Tensor]) -> None:
        _save(self.folder / f"{name}.safetensors", state)
        self.state["shards"][name] = {"names": sorted(state), "bytes": sum(t.nbytes for t in state.values())}


_OURS = ("sparsity.json", "report.json")


def check_out(out: Path, source: Path | None, force: bool) -> None:
    """Raise unless a result may be written to ``out``."""
    if source is not None and out.absolute() == source.absolute():
        raise GossamerError(f"the output {out} is the model itself; give another directory")
    if out.exists() and not out.is_dir():
        raise GossamerError(f"the output {out} is a file; give a directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise GossamerError(f"the output directory {out} is not empty; give another, or --force to replace it")


def _write_sparsity(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    kept = {r["name"]: {k: r[k] for k in ("shape", "sparsity", "nnz")} for r in rows}
    write_text(folder / "sparsity.json", json.dumps({"format": 1, "weights": kept}, indent=1) + "\n")


def _place(file: Path, at: Path) -> None:
    """Give a finished file a second name, so that a run killed while publishing can still go on; copy where links fail."""
    try:
        at.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, at)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError

    with replacing(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise OSError(str(error)) from error


def _identity(source: Path) -> list[Any]:
    """Return what tells one state of a directory from another without reading its weights."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.iterdir()) if f.is_file()]


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            digest.update(batch[key].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _unflatten(found: dict[str, Tensor], lane: int, length: int | None) -> Any:
    if length is None:
        return found[f"{lane}.0"]
    return tuple(found.get(f"{lane}.{i}") for i in range(length))
