"""The weights site: prune the linear weights of a transformers model, in place."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gossamer import scores, solvers
from gossamer.core.errors import GossamerError
from gossamer.core.format import Format
from gossamer.core.pattern import Pattern
from gossamer.core.report import Report
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Solver
from gossamer.core.spec import show
from gossamer.core.stats import INPUTS, Stats
from gossamer.sites._calibrate import Batch, Calibration, Visit
from gossamer.sites._gradients import gradients
from gossamer.sites._inputs import calibration_batches, check_batches
from gossamer.sites._job import Job, check_finite, recipe_of, select_targets, show_method
from gossamer.sites._rows import describe, peak_bytes, phases
from gossamer.sites._swap import swap_in
from gossamer.sites._walk import Target

# How many groups of calibration windows go through a block in lockstep. More lanes: smaller temporaries, smaller products.
LANES = 16


def prune(
    model: nn.Module,
    method: str | Score | Solver | Factorizer,
    pattern: str | Pattern,
    *,
    sparsity: float | None = None,
    allocate: Any = "uniform",
    data: str | Path | Tensor | Sequence[Batch] | None = None,
    tokenizer: Any = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    targets: str | None = None,
    device: str | torch.device | None = None,
    lanes: int = LANES,
    progress: bool | None = None,
) -> Report:
    """Prune a transformers model in place; a method that factorizes (`ARMOR`) puts a `SparseLinear` in each linear's place.

    Args:
        model: a transformers model; tied weights stay tied, dtypes and devices stay as they are.
        method: a score or solver, or its spec: "Magnitude", "Wanda", "SparseGPT(damp=0.02)".
        pattern: "2:4", "Unstructured", "Unstructured(per='row')", "4x1" ...
        sparsity: fraction of zeros in [0, 1); left out where the pattern fixes its own.
        allocate: "uniform", "erk", "global_", "owl", or a mapping of names (or globs) to sparsities.
        data: calibration text (a file, a directory, "builtin", a data set's name), token ids of shape (samples, seqlen), or
            a sequence of keyword-argument mappings for the model.
        tokenizer: for text; by default the one saved with the model.
        seqlen, samples, sample, seed: how windows are cut and drawn from text (see `gossamer.data`).
        targets: which weights, by name or glob ("*.mlp.*"); by default every linear inside the blocks.
        device: where blocks are worked on, one at a time; by default where the model is.
        lanes: groups of windows that go through a block in lockstep; more use less memory.
        progress: show a bar; by default only on a terminal.

    Returns:
        The `Report`, a row for each weight.

    Raises:
        GossamerError: anything asked for that cannot be; the model is unchanged.

    Source: calibration block by block follows Frantar and Alistarh (2023); see each method for its own.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> report = prune(LlamaForCausalLM(tiny), "Wanda", "2:4", data=torch.randint(64, (4, 16)))
    >>> report.totals["sparsity"]
    0.5
    """
    started = time.perf_counter()
    job = Job.of(method, pattern, sparsity, allocate)
    chosen = select_targets(model, job, targets)
    for target in chosen:
        check_finite(target)
    place, folder = next(model.parameters()).device, getattr(model, "name_or_path", "")
    batches = calibration_batches(job, data, tokenizer, seqlen, samples, sample, seed, lanes, folder=folder, device=place)
    check_batches(model, batches)
    recipe = recipe_of(
        job, data=data, seqlen=seqlen, samples=samples, sample=sample, seed=seed, targets=targets, batches=batches
    )
    where = None if device is None else torch.device(device)
    training = model.training
    model.eval()  # dropout would blur the statistics
    try:
        sparsities = allocated(model, job, chosen, batches, where, progress)
        calibrated = time.perf_counter()
        rows, packed = _prune_all(model, job, chosen, sparsities, batches, where, progress)
    finally:
        model.train(training)
    seconds = {"allocate": calibrated - started, **phases(rows, time.perf_counter() - calibrated)}
    report = Report(
        kind="prune",
        recipe=recipe,
        model=describe(model),
        weights=rows,
        seconds={**seconds, "total": time.perf_counter() - started},
        peak_bytes=peak_bytes(),
    )
    swap_in(model, packed)  # of a method that factorizes: the model described is the one before
    return report


def _prune_all(
    model: nn.Module,
    job: Job,
    chosen: Sequence[Target],
    sparsities: Mapping[str, float | None],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> tuple[list[dict[str, Any]], dict[Target, Format]]:
    rows: dict[str, dict[str, Any]] = {}
    packed: dict[Target, Format] = {}
    home = {target: target.parameter.device for target in chosen}
    with bar(len(chosen), f"{show_method(job.solver)} {job.pattern}", progress) as shown:

        def visit(target: Target, stats: list[Stats]) -> None:
            shown.set_postfix_str(target.name.removesuffix(".weight"), refresh=False)
            rows[target.name], product = job.prune(target, stats, sparsities[target.name])
            if product is not None:  # the device has one block at a time
                tensors = {name: tensor.to(home[target]) for name, tensor in product.tensors(derived=True).items()}
                packed[target] = replace(product, **tensors)  # type: ignore[type-var]
            shown.update()

        visit_all(model, job.gather, chosen, batches, device, visit)
    return [rows[target.name] for target in chosen], packed


def visit_all(
    model: nn.Module,
    gather: frozenset[str],
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    visit: Visit,
) -> None:
    """Hand over every target once with the statistics named in ``gather``, block by block where these come from inputs."""
    if gather & INPUTS:
        walk = Calibration(model, batches, gather, device=device)
        for index in range(len(walk.blocks)):
            walk.block(index, [target for target in chosen if target.block == index], visit)
        return
    grads = gradients(model, batches, chosen) if "grad" in gather else {}
    for block in dict.fromkeys(target.block for target in chosen):
        inside = [target for target in chosen if target.block == block]
        each = gradients(model, batches, inside, each=True) if "grads" in gather else {}  # large: of one block at a time
        for target in inside:
            visit(target, blank_stats(target, grads.pop(target.name, None), each.pop(target.name, None)))


def allocated(
    model: nn.Module,
    job: Job,
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> dict[str, float | None]:
    """Return the sparsity of each target, after a pass over the dense model where the allocation wants one."""
    if not job.pattern.takes_sparsity:
        return {target.name: None for target in chosen}
    tensors = {target.name: target.matrices() for target in chosen}
    if needed := job.allocation_needs:
        score = scores.Wanda() if "wanda" in needed else _score_of(job)
        tensors = _dense_scores(model, score, chosen, batches, device, progress)
    return dict(job.allocation(tensors, job.sparsity))


def _dense_scores(
    model: nn.Module,
    score: Score,
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> dict[str, Tensor]:
    """Score every target on the dense model; all scores are held at once."""
    found: dict[str, Tensor] = {}
    with bar(len(chosen), f"scores by {score}", progress) as shown:

        def visit(target: Target, stats: list[Stats]) -> None:
            pairs = zip(target.matrices(), stats, strict=True)
            found[target.name] = torch.stack([score(w, s) for w, s in pairs]).to(target.parameter.device)
            shown.update()

        visit_all(model, score.needs, chosen, batches, device, visit)
    return {target.name: found[target.name] for target in chosen}


def _score_of(job: Job) -> Score:
    if isinstance(job.solver, solvers.Mask):
        return job.solver.score
    raise GossamerError(
        f"allocate={show(job.allocation)} ranks the scores of all weights together, and {show_method(job.solver)} has none "
        "outside its own sweep; use uniform, erk or owl with it"
    )


def blank_stats(target: Target, grad: Tensor | None = None, grads: Tensor | None = None) -> list[Stats]:
    """Return statistics without inputs, one for each matrix of the target, holding its gradients where there are some."""
    count, _, width = target.matrices().shape
    stats = [Stats(width, device=target.parameter.device) for _ in range(count)]
    for name, given in (("grad", grad), ("grads", grads)):
        if given is not None:
            stacked = given if target.stacked else given.unsqueeze(-3)
            matrices = (stacked.transpose(-1, -2) if target.transposed else stacked).unbind(-3)
            for known, matrix in zip(stats, matrices, strict=True):
                setattr(known, name, matrix)
    return stats


def bar(total: int, what: str, progress: bool | None) -> Any:
    """Return a progress bar; shown when asked for, or, if ``progress`` is None, on a terminal."""
    return tqdm(total=total, desc=what, disable=None if progress is None else not progress, leave=False, dynamic_ncols=True)
