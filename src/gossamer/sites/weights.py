"""The weights site: prune the linear weights of a transformers model, in place."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.format import Format
from gossamer.core.pattern import Pattern
from gossamer.core.report import Report
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Solver
from gossamer.core.stats import Stats
from gossamer.sites._allocated import allocated
from gossamer.sites._bar import bar as bar
from gossamer.sites._calibrate import Batch
from gossamer.sites._inputs import calibration_batches, check_batches
from gossamer.sites._job import Job, check_finite, select_targets, show_method
from gossamer.sites._pruning import Pruning, check_mlps
from gossamer.sites._recipe import recipe_of
from gossamer.sites._rows import describe, peak_bytes, phases
from gossamer.sites._swap import swap_in
from gossamer.sites._visit import visit_all
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
        allocate: "uniform", "erk", "global_", "owl", "searched" ..., or a mapping of names (or globs) to sparsities.
        data: calibration text (a file, a directory, "builtin", a data set's name), token ids of shape (samples, seqlen), or
            a sequence of keyword-argument mappings for the model.
        tokenizer: for text; by default the one saved with the model.
        seqlen, samples, sample, seed: how windows are cut and drawn from text (see `gossamer.data`).
        targets: which weights, by name or glob ("*.mlp.*"); by default every linear inside the blocks.
        device: where blocks are worked on, one at a time; by default where the model is, which is where gradients are taken.
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
        check_mlps(model, job, chosen, batches)
        loaded = time.perf_counter()
        approach(model, job, chosen, batches, where, progress)
        sparsities = allocated(model, job, chosen, batches, where, progress)
        allotted = time.perf_counter()
        rows, packed = _prune_all(model, job, chosen, sparsities, batches, where, progress)
    finally:
        model.train(training)
    before = {"load": loaded - started, "allocate": allotted - loaded}
    seconds = {**before, **phases(rows, time.perf_counter() - allotted)}
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
            for done, row, product in pruning.prune(target, stats):
                rows[done.name] = row
                if product is not None:  # the device has one block at a time
                    tensors = {name: tensor.to(home[done]) for name, tensor in product.tensors(derived=True).items()}
                    packed[done] = replace(product, **tensors)  # type: ignore[type-var]
                shown.update()

        pruning = Pruning(model, job, chosen, sparsities)
        visit_all(model, job.gather, chosen, batches, device, visit, pruning, progress)
    return [rows[target.name] for target in chosen], packed


def approach(
    model: nn.Module,
    job: Job,
    chosen: Sequence[Target],
    batches: Sequence[Batch],
    device: torch.device | None,
    progress: bool | None,
) -> None:
    """Prune in all rounds but the last: after round k the density is (1 − S)^(k/rounds)."""
    with bar(job.rounds, f"rounds of {show_method(job.solver)}", progress if job.rounds > 1 else False) as shown:
        for k in range(1, job.rounds):
            assert job.sparsity is not None
            part = replace(job, sparsity=1 - (1 - job.sparsity) ** (k / job.rounds))
            _prune_all(model, part, chosen, allocated(model, part, chosen, batches, device, False), batches, device, False)
            shown.update()
