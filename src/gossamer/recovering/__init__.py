"""Recover: from a pruned directory to a trained one that has the same zeros."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern
from gossamer.core.report import Report
from gossamer.core.spec import parse, show
from gossamer.core.tuner import How, Tuner
from gossamer.data import evaluation as evaluation_windows
from gossamer.data import texts, windows
from gossamer.evaluate import check_ids, perplexity
from gossamer.models import causal_lm, check_directory, resolve, skeleton, tokenizer
from gossamer.recovering._blocks import by_blocks
from gossamer.recovering._loop import Broken, Job, Plan, by_steps
from gossamer.recovering._result import cast, check_zeros, command_of, masks_of, stopped
from gossamer.recovering._state import DIGESTS, State
from gossamer.sites._rows import describe, peak_bytes, restart_peak, row
from gossamer.sites._walk import targets as find_targets
from gossamer.sites.checkpoint import check_out, digest, identity, save
from gossamer.sites.distilling import distill
from gossamer.sites.reconstructing import Reconstruct
from gossamer.tuners import Full
from gossamer.tuning import TUNERS, checked

EVERY = 120.0  # seconds between two states on disk


def recover(
    source: str | Path,
    out: str | Path,
    method: str | Tuner | Reconstruct = "Full",
    pattern: str | None = None,
    *,
    data: str | Path,
    steps: int,
    teacher: str | Path | None = None,
    loss: str = "distill",
    sparsity: float | None = None,
    rate: float | None = None,
    batch: int = 4,
    micro: int | None = None,
    seqlen: int = 512,
    max_norm: float = 1.0,
    seed: int = 0,
    evaluate: str | Path | None = None,
    evaluated: int | None = None,
    eval_seqlen: int = 512,
    targets: str | None = None,
    device: str | torch.device | None = None,
    every: float = EVERY,
    progress: bool | None = None,
    force: bool = False,
    name: str | None = None,
) -> Report:
    """Train the pruned model in ``source`` on text, and save it with the same zeros in ``out``.

    AdamW, in float32 (autocast to bfloat16 on a GPU), the rate up over a tenth of the steps and then down to nothing. A run
    that was killed and is started again goes on to the same bits; ``out`` appears whole or not at all.

    Args:
        source: a directory of a pruned model, as `gossamer prune` writes it; of one that `gossamer shrink` made, all of whose
            weights are trained; a dense one, for methods that choose the mask.
        method: how: a tuner's spec, such as "Full" or "MaskLoRA(rank=16)", or "Reconstruct", which refits block by block on the
            windows of all steps.
        pattern, sparsity: for methods that choose the mask.
        data: text to train on, as in `prune`.
        steps, batch, seqlen: optimizer steps, and windows of how many tokens in each.
        micro: windows in one pass; fewer than ``batch`` take less memory.
        teacher: the dense model; by default the one that the report of ``source`` says it was pruned from.
        loss: "distill", with weights such as "distill(task=0.0, hidden=1.0)", or "task", which needs no teacher.
        rate: the learning rate at its highest; by default the method's.
        max_norm: the norm that gradients are cut to.
        evaluate, evaluated, eval_seqlen: text on which to measure perplexity before and after, how many windows of it, and how
            many tokens in each.
        every: seconds between two states on disk.
        others: as in `gossamer.prune`.

    Returns:
        The `Report`, of kind "recover".

    Raises:
        GossamerError: anything asked for that cannot be; another recipe's run stands half-way; the loss became NaN (the model
            as it was before is saved beside ``out``).
    """
    started = time.perf_counter()
    source, out = Path(source), Path(out)
    tuner, shape, fraction = read(method, pattern, sparsity, steps)
    chooses = isinstance(tuner, Tuner) and tuner.chooses
    wanted, blocks = parse(loss, LOSSES, "loss"), isinstance(tuner, Reconstruct)
    if blocks and (rate is not None or wanted is not distill):
        raise GossamerError(f"{show(tuner)} has a rate and a loss of its own: write Reconstruct(rate=...), and leave loss out")
    plan = Plan(steps, batch, micro or batch, tuner.rate if rate is None else rate, max_norm, seed)
    check_directory(source)
    target, before = check_out(out, source, force), _report_of(source)
    trainable = before["shrunk"] and isinstance(tuner, Full)  # without any zeros; other methods are about these
    structure, tokens = skeleton(source), tokenizer(source)
    chosen = find_targets(structure, targets)
    text = windows(texts(data, split="calibration"), tokens, seqlen)
    held_out = None if evaluate is None else evaluation_windows(evaluate, tokens, seqlen=eval_seqlen, first=evaluated)
    for ids in (text, held_out):
        if ids is not None:
            check_ids(structure, ids)
    taught = wanted is not task or teacher is not None
    if taught and not (teacher or before["teacher"] or chooses):
        masks_of(
            find_targets(causal_lm(source), targets), show(tuner), trainable
        )  # a dense model needs no teacher, but is told so first
    dense_path = _teacher(teacher or before["teacher"], given=teacher is not None, source=source) if taught else None
    recipe = {
        "method": show(tuner),
        "chooses": chooses,
        "pattern": str(shape) if shape else before["pattern"],
        "sparsity": fraction if shape else before["sparsity"],
        "source": str(source),
        "pruned_by": before["method"],
        "shrunk": before["shrunk"],
        "teacher": str(teacher or before["teacher"]) if taught else None,
        "loss": None if blocks else show(wanted),
        "data": str(data),
        "seqlen": seqlen,
        **vars(plan),
        **({"rate": None, "micro": None} if blocks else {}),
        "targets": targets,
    }
    same = dict(zip(DIGESTS, (digest([{"ids": text}]), identity(source)), strict=True))
    with State(target, recipe | same, force=force) as state:
        check_out(out, source, force)  # again: another run may have finished in the meantime
        restart_peak()
        model = causal_lm(source, torch.float32, device)
        dense = None if dense_path is None else causal_lm(dense_path, torch.float32, device)
        found = {} if held_out is None else {"before": perplexity(model, held_out)["perplexity"]}
        if held_out is not None and dense is not None:
            found["dense"] = perplexity(dense, held_out)["perplexity"]
        chosen = find_targets(model, targets)
        masks = {} if chooses else masks_of(chosen, show(tuner), trainable, getattr(tuner, "group", None))
        whole = not chooses and not masks
        watched = [getattr(t.module, t.attribute) for t in chosen if t.name in masks]
        loaded = time.perf_counter()
        job = Job(
            tuner, How(steps, shape, fraction, targets, dense, whole), plan, wanted, model, text, watched, every, progress
        )
        try:
            outcome = (by_blocks if isinstance(tuner, Reconstruct) else by_steps)(job, state)
        except Broken as error:
            state.over = True
            raise stopped(error, target, tokens, structure.dtype, plan) from error
        model = outcome.model.eval()
        chosen = find_targets(model, targets)
        check_zeros(chosen, masks)
        rounded = cast(model, chosen, structure.dtype)
        report = Report(
            kind="recover",
            recipe={**recipe, "command": command_of(recipe, out)},
            model=describe(model, name or before["model"] or str(source)),
            weights=[row(t) for t in chosen],
            seconds={"load": loaded - started, "train": outcome.seconds, "total": loaded - started + outcome.seconds},
            peak_bytes=peak_bytes(),
            training={**found, "losses": outcome.losses, "trainable": outcome.trained, "rounded": rounded},
            blocks=outcome.blocks,
        )
        if held_out is not None:
            report.evaluation = {**perplexity(model, held_out), "data": str(evaluate)}
        save(model.cpu(), target, report=report, tokenizer=tokens, force=force)
    return report


@contextmanager
def task(student: nn.Module, teacher: nn.Module | None) -> Iterator[Callable[..., Tensor]]:
    """Give the model's own loss, which needs no teacher."""
    size: Any = student.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    loss: Any = student.loss_function
    yield lambda outputs, labels: loss(logits=outputs.logits, labels=labels, vocab_size=size)


LOSSES = {"distill": distill, "task": task}
WAYS = {**TUNERS, "Reconstruct": Reconstruct}


def read(
    method: str | Tuner | Reconstruct, pattern: str | None, sparsity: float | None, steps: int
) -> tuple[Tuner | Reconstruct, Pattern | None, float | None]:
    """Read what is asked for, as far as it shows without a model; reconstruction is no tuner, as it has no loop."""
    chosen = parse(method, WAYS, "method") if isinstance(method, str) else method
    if not isinstance(chosen, Reconstruct):
        return checked(chosen, pattern, sparsity, steps)
    if pattern is not None or sparsity is not None:
        raise GossamerError(f"{show(chosen)} keeps the zeros that are there: leave pattern and sparsity out")
    return chosen, None, None


def _report_of(source: Path) -> dict[str, Any]:
    """Return what the report of a directory says of how it was pruned, or shrunk; Nones where there is none."""
    names = ("method", "pattern", "sparsity", "model", "teacher", "shrunk")
    if not (source / "report.json").is_file():
        return {**dict.fromkeys(names), "shrunk": False}
    report = Report.load(source / "report.json")
    recipe, model = report.recipe, report.model.get("name")
    method = " → ".join(filter(None, [recipe.get("pruned_by"), recipe.get("method")])) or None  # trained before
    shrunk = report.kind == "shrink" or bool(recipe.get("shrunk"))
    taught = recipe.get("teacher") or model
    return dict(zip(names, (method, recipe.get("pattern"), recipe.get("sparsity"), model, taught, shrunk), strict=True))


def _teacher(name: str | Path | None, *, given: bool, source: Path) -> Path:
    """Return the directory of the dense model: the one asked for, or the one that ``source`` was pruned from."""
    if name is None:
        raise GossamerError(
            f"distilling needs the dense model, and {source} has no report that names it: give the teacher, or the loss task"
        )
    try:
        path = resolve(str(name))
        check_directory(path)
    except GossamerError as error:
        hint = "" if given else f" ({source} says it was pruned from it: give the teacher, or the loss task)"
        raise GossamerError(f"{error}{hint}") from None
    return path
