"""Compare: several methods on the same model, data, patterns and sparsities. One JSON document, one row a run."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gossamer.core.atomic import write_text
from gossamer.core.errors import GossamerError
from gossamer.core.report import FORMAT, environment, read_json
from gossamer.core.spec import show
from gossamer.data import calibration
from gossamer.data import evaluation as evaluation_windows
from gossamer.evaluate import check_ids, known_tasks, perplexity
from gossamer.evaluate import tasks as measured_tasks
from gossamer.models import causal_lm, check_directory, skeleton, tokenizer
from gossamer.sites._job import Job, check_finite, select_targets, show_method
from gossamer.sites._jobs import EVERY, jobs_of
from gossamer.sites._recipe import command_of
from gossamer.sites._rows import describe, peak_bytes, restart_peak
from gossamer.sites._walk import targets as find_targets
from gossamer.sites.checkpoint import save
from gossamer.sites.weights import bar, prune
from gossamer.speed import decoding

Say = Callable[[str], None]


def compare(
    source: Path,
    methods: Sequence[str],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    folder: Path,
    *,
    data: str = "builtin",
    evaluation: str | None = None,
    windows: int | None = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    allocate: str = "uniform",
    targets: str | None = None,
    alone: Sequence[tuple[Job, str]] = (),
    device: str | None = None,
    keep_models: bool = False,
    speed: bool = False,
    seeds: int = 1,
    tasks: str | None = None,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    name: str | None = None,
    command: str | None = None,
    progress: bool | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Prune and evaluate one model by every method, at every pattern and sparsity.

    Everything asked for is read and checked before the first run starts. Each finished run is kept in ``folder/runs``, so
    that the same call goes on where it stopped.

    Args:
        source: a model directory.
        methods, patterns, sparsities: all combinations are run; a pattern that fixes its own sparsity is run once. "all" is
            every method that is defined for the pattern.
        folder: receives compare.json, runs/ and, with ``keep_models``, models/.
        data, evaluation: calibration text and evaluation text; the same name by default, of which data sets (and "builtin")
            give two disjoint splits.
        windows: evaluate on the first so many windows.
        alone: jobs that are also run on some targets alone, by name or glob; the document's "layers" says what that does.
        speed: pack each pruned model too where that pays here, and time its decoding beside the dense model's.
        seeds: run each so many times, with the seeds ``seed``, ``seed + 1`` ... for its windows; what reads no data runs once.
        tasks, tasks_dir, limit: lm-eval's tasks, as in `gossamer.evaluate.tasks`: the dense model answers these too, and every
            pruned one of the first seed.
        device: where each model is, as a whole.
        others: as in `gossamer.prune`.

    Returns:
        The comparison as one JSON object: model, environment, data, dense, and runs, each a `Report` with its evaluation.

    Raises:
        GossamerError: anything asked for that cannot be, before anything is done.
    """
    check_directory(source)
    jobs = jobs_of(methods, patterns, sparsities, allocate)
    if seeds < 1:
        raise GossamerError(f"seeds is how many times each method runs, at least 1, not {seeds}")
    if tasks is not None:
        known_tasks(tasks, tasks_dir)
    evaluation = evaluation or data
    tokens = tokenizer(source)
    ids = evaluation_windows(evaluation, tokens, seqlen=seqlen, first=windows)
    structure = skeleton(source)
    check_ids(structure, ids)
    windows_of: list[Any] = [ids]
    for job in list(jobs):
        try:
            select_targets(structure, job, targets, weightless=True)
        except GossamerError as error:
            if EVERY not in methods or show_method(job.solver) in methods:
                raise
            say(f"left out: {error}")
            jobs.remove(job)
    for job, only in alone:
        select_targets(structure, job, only, weightless=True)
    if any(job.needs_data for job in [*jobs, *(job for job, _ in alone)]):
        known = calibration(data, tokens, seqlen=seqlen, samples=samples, sample=sample, seed=seed)  # type: ignore[arg-type]
        check_ids(structure, known)
        windows_of.append(known)
    if folder.exists() and not folder.is_dir():
        raise GossamerError(f"the output {folder} is a file; give a directory")
    if folder.resolve() == source.resolve():
        raise GossamerError(f"the output {folder} is the model itself; give another directory")
    if (folder / "config.json").exists():
        raise GossamerError(f"the output {folder} is the directory of a model; give another")
    identity = _identity(source, windows_of, [data, seqlen, samples, sample, seed, targets])
    runs_folder = folder / "runs"

    def score(model: Any, what: str, answers: bool = True) -> dict[str, Any]:
        found = {**perplexity(model, ids, device=device, progress=shown(what, progress)), "data": evaluation}
        if tasks is not None and answers:
            say(f"{what}: {tasks}")
            found["tasks"] = measured_tasks(model, tasks, tasks_dir, tokenizer=tokens, limit=limit, device=device)
        return found

    def once(label: str, run: Callable[[], dict[str, Any]], how: str = "", wants: Path | None = None) -> dict[str, Any]:
        kept = runs_folder / f"{hashlib.sha256((identity + label + how).encode()).hexdigest()[:16]}.json"
        if kept.exists() and (wants is None or wants.is_dir()):
            say(f"{label}: kept from the run before")
            found: dict[str, Any] = read_json(kept)
            return found
        restart_peak()
        result = run()
        write_text(kept, json.dumps(result, indent=1) + "\n")
        return result

    def dense() -> dict[str, Any]:
        model = causal_lm(source)
        for target in find_targets(model, targets):
            check_finite(target)
        say("dense")
        return {"model": describe(model, name or str(source)), **score(model, "dense"), "peak_bytes": peak_bytes()}

    def pruned(job: Job, label: str, saved: Path | None, targets: str | None, speed: bool, turn: int) -> dict[str, Any]:
        say(label)
        model = causal_lm(source)
        if device is not None:  # as a whole, as when it is evaluated: gradients are taken where the model is
            model.to(device)
        report = prune(
            model,
            job.solver,
            job.pattern,
            sparsity=job.sparsity if job.pattern.takes_sparsity else None,
            allocate=job.allocation,
            data=data,
            tokenizer=tokens,
            seqlen=seqlen,
            samples=samples,
            sample=sample,
            seed=seed + turn,
            targets=targets,
            device=device,
            progress=progress,
        )
        report.model["name"] = name or str(source)
        report.recipe["command"] = command_of(name or str(source), report.recipe, "pruned")
        report.evaluation = score(model, label, answers=not turn)
        if saved is not None:
            started = time.perf_counter()
            save(model, saved, report=report, tokenizer=tokens, force=True)
            report.seconds["save"] = time.perf_counter() - started
        if speed:
            say(f"{label}: packing and timing")
            report.speed = decoding(model, job.pattern, progress=progress)
        return report.to_json()

    answered = "" if tasks is None else f" {tasks} {tasks_dir} {limit}"
    reference = once("dense", dense, answered)
    document: dict[str, Any] = {
        "format": FORMAT,
        "kind": "compare",
        "command": command,
        "model": reference["model"],
        "environment": environment(),
        "data": {"calibration": data, "evaluation": evaluation},
        "dense": {**{k: v for k, v in reference.items() if k != "model"}, "bytes": reference["model"]["bytes"]},
        "runs": [],
    }
    for job, turn in [(each, turn) for each in jobs for turn in range(seeds if each.needs_data else 1)]:
        again = f"seed {seed + turn}" if turn else ""
        label = " ".join(filter(None, [show_method(job.solver), str(job.pattern), _at(job), again]))
        saved = folder / "models" / _slug(label) if keep_models else None
        timed = speed and not turn and not job.factorizes  # whose products are run as they are: there is nothing to pack
        run = partial(pruned, job, label, saved, targets, timed, turn)
        how = show(job.allocation) + (" timed" if timed else "") + ("" if turn else answered)
        document["runs"].append(once(label, run, how, saved))
        write_text(folder / "compare.json", json.dumps(document, indent=1) + "\n")
    for job, only in alone:
        label = " ".join(filter(None, [show_method(job.solver), str(job.pattern), _at(job), "in", only, "alone"]))
        found = once(label, partial(pruned, job, label, None, only, False, 0), show(job.allocation) + answered)
        where = {"block": found["weights"][0]["block"], **{key: found["recipe"][key] for key in ("method", "pattern")}}
        reached = {"sparsity": found["totals"]["sparsity"], "perplexity": found["evaluation"]["perplexity"]}
        document.setdefault("layers", []).append({"targets": only, **where, **reached})
    return document


def _at(job: Job) -> str:
    return f"{job.sparsity:g}" if job.pattern.takes_sparsity else ""


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


def _identity(source: Path, ids: Sequence[Any], how: Sequence[Any]) -> str:
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.glob("*.safetensors"))]
    digests = [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in ids]
    return json.dumps([files, digests, how, environment()["gossamer"]], sort_keys=True)


def shown(what: str, progress: bool | None) -> Callable[[Iterable[int], str, int], Iterable[int]]:
    """Return the wrapper by which `perplexity` shows how far it is."""

    def wrap(steps: Iterable[int], description: str, total: int) -> Iterable[int]:
        with bar(total, f"{what}: {description}", progress) as drawn:
            for step in steps:
                yield step
                drawn.update()

    return wrap
