"""The structure site: remove whole channels, heads, blocks or ranks of a transformers model, in place."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import structures
from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.core.spec import names_in, parse
from gossamer.core.structure import Once, Structure
from gossamer.evaluate import check_ids
from gossamer.sites._calibrate import Batch
from gossamer.sites._coupling import couplings
from gossamer.sites._inputs import batches_of, check_batches
from gossamer.sites._job import check_finite
from gossamer.sites._latency import Latency, measure, whole_pass
from gossamer.sites._rows import describe, peak_bytes
from gossamer.sites._skeleton import ModelSkeleton, count, try_out
from gossamer.sites._walk import blocks_of, targets
from gossamer.sites._widths import KINDS, settle, widths_of
from gossamer.sites.weights import LANES

STRUCTURES = names_in(structures)


def shrink(
    model: nn.Module,
    method: str | Structure,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    at: tuple[int, int] = (1, 512),
    data: str | Path | Tensor | Sequence[Batch] | None = None,
    tokenizer: Any = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    device: str | torch.device | None = None,
    lanes: int = LANES,
    progress: bool | None = None,
    once: Once | None = None,
) -> Report:
    """Remove structure from a transformers model in place: what is left is a smaller dense one.

    Args:
        model: a transformers model; tied weights stay tied, dtypes and devices stay as they are.
        method: a method of structure, or its spec: "Depth", "CFSP(multiple=128)".
        sparsity: the fraction of the parameters inside the blocks that goes, in (0, 1).
        speedup: instead of it, how many times as fast a pass shall be; times are measured where the model is.
        at: the pass that ``speedup`` is of: (batch, tokens), without a cache.
        data: calibration text (a file, a directory, "builtin", a data set's name), token ids of shape (samples, seqlen), or
            a sequence of keyword-argument mappings for the model.
        tokenizer: for text; by default the one saved with the model.
        seqlen, samples, sample, seed: how windows are cut and drawn from text (see `gossamer.data`).
        device: where blocks are worked on, one at a time; by default where the model is.
        lanes: groups of windows that go through a block in lockstep; more use less memory.
        progress: show a bar; by default only on a terminal.
        once: keeps the steps of a method that takes long, for the same call to go on after it was stopped, as the command does;
            by default nothing is kept.

    Returns:
        The `Report`; its ``structure`` counts parameters and blocks before and after, and says what opens the result. With
        ``speedup`` it has the seconds of a pass before and after too, and the table of times.

    Raises:
        GossamerError: anything asked for that cannot be; the model is unchanged (but for `AdaptPruner`'s finished rounds).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=64)
    >>> report = shrink(LlamaForCausalLM(tiny), "Depth", sparsity=0.25, data=torch.randint(64, (4, 16)))
    >>> report.structure["blocks"], report.structure["plain"]
    ([4, 3], True)
    """
    started = time.perf_counter()
    how = structure_of(method)
    goes = goal_of(how, sparsity, speedup, at)
    blocks = blocks_of(model)[1]
    for target in targets(model):
        if target.parameter.is_meta:
            raise GossamerError(f"{target.name} is offloaded: load the model whole to shrink it")
        check_finite(target)
    kinds = [kind for kind in KINDS if kind in how.removes]
    found = {kind: couplings(model, blocks, kind) for kind in kinds}
    folder, place = getattr(model, "name_or_path", ""), next(model.parameters()).device
    drawn = data, seqlen, samples, sample, seed
    batches = windows_of(model, how, *drawn, lanes=lanes, tokenizer=tokenizer, folder=folder, device=place)
    if speedup is not None:
        try:
            check_ids(model, torch.zeros(tuple(at), dtype=torch.long))
        except GossamerError as error:
            raise GossamerError(f"at={at[0]}x{at[1]}: {error}") from error
    training = model.training
    model.eval()  # dropout would blur the statistics
    before = count(model)
    skeleton = ModelSkeleton(model, how, batches, None if device is None else torch.device(device), progress, once)
    try:
        if batches:
            try_out(skeleton, [by_block[0] for by_block in found.values()])
        times = measure(model, kinds, at, progress) if speedup is not None else None
        skeleton.budget = times or skeleton.budget
        try:
            how(skeleton, goes)
        except ArithmeticError as error:
            raise GossamerError(str(error)) from error
        plain = settle(model)
        latency = {} if times is None else {"latency": _reached(times, whole_pass(model, at), speedup, at)}
    finally:
        model.train(training)
    after = count(model)
    if after["inside"] == before["inside"]:
        raise GossamerError(f"{how} finds nothing that it could remove whole for so little; nothing has changed")
    structure = {
        **{what: [before[what], after[what]] for what in before},
        "sparsity": 1 - after["inside"] / before["inside"],
        "plain": plain,
        "widths": dict(widths_of(model)),
        **latency,
    }
    asked = {"sparsity": sparsity} if speedup is None else {"speedup": speedup, "at": list(at)}
    told = _drawn(data, batches, seqlen, samples, sample, seed)
    return Report(
        kind="shrink",
        recipe={"method": repr(how), "pattern": None, **asked, **told},
        model=describe(model),
        weights=[],
        blocks=skeleton.rows,
        structure=structure,
        seconds={"total": time.perf_counter() - started},
        peak_bytes=peak_bytes(),
    )


def windows_of(
    model: nn.Module,
    how: Structure,
    data: Any,
    seqlen: int,
    samples: int,
    sample: str,
    seed: int,
    *,
    lanes: int,
    tokenizer: Any,
    folder: Any,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Return the calibration windows that a method needs, none if it needs nothing; the model may have no weights.

    Raises:
        GossamerError: there is no data, or it does not fit the model or the method.
    """
    if not how.needs:
        return []
    if data is None:
        raise GossamerError(f"{how} needs calibration data: give data= a text file, token ids, or 'builtin'")
    split = lambda ids: ids.tensor_split(min(lanes, len(ids)))  # noqa: E731
    batches: list[Batch] = batches_of(
        data, tokenizer, seqlen, samples, sample, seed, split, folder=folder, device=torch.device(device)
    )
    check_batches(model, batches)
    if how.needs & {"grad", "divergence"}:
        told, head = f"{how} looks at what the model says of the next token", getattr(model, "get_output_embeddings", None)
        if not all("input_ids" in batch for batch in batches):
            raise GossamerError(f"{told}, so each mapping needs input_ids")
        if head is None or head() is None:
            raise GossamerError(f"{told}, and {type(model).__name__} has no head")
    return batches


def structure_of(method: str | Structure) -> Structure:
    """Read a method's spec.

    Raises:
        GossamerError: there is no such method of structure.
    """
    found = parse(method, STRUCTURES, "structure") if isinstance(method, str) else method
    if not isinstance(found, Structure):
        raise GossamerError(f"{method!r} is no method of structure, such as {' or '.join(sorted(STRUCTURES))}")
    return found


def goal_of(how: Structure, sparsity: float | None, speedup: float | None, at: Sequence[int]) -> float:
    """Return the fraction of the budget that is to go.

    Raises:
        GossamerError: none or both of the two are given, one is out of range, or the method has no budget of time.
    """
    if (sparsity is None) == (speedup is None):
        raise GossamerError("say how much is to go: either sparsity or speedup")
    if speedup is None:
        assert sparsity is not None
        if not 0 < sparsity < 1:
            raise GossamerError(f"sparsity is the fraction of the blocks' parameters that goes, in (0, 1); got {sparsity}")
        return sparsity
    if not how.timed:
        able = sorted(name for name, kind in STRUCTURES.items() if getattr(kind, "timed", False))
        raise GossamerError(f"{how} takes a sparsity, no speed-up; what goes by time is {', '.join(able)}")
    if not 1 < speedup < float("inf"):
        raise GossamerError(f"a speed-up is how many times as fast the model shall be, over 1; got {speedup}")
    if len(at) != 2 or min(at) < 1:
        raise GossamerError(f"at is (batch, tokens), both at least 1; got {tuple(at)}")
    return 1 - 1 / speedup


def opens(plain: bool, folder: str | Path = "DIR") -> str:
    """Say what loads a shrunk model."""
    if plain:
        return f"plain transformers opens it: from_pretrained({str(folder)!r})"
    return (
        f"gossamer.load({str(folder)!r}) opens it, or from_pretrained after `import gossamer.hf`: "
        "its blocks differ in width or rank, which transformers has no word for"
    )


def _reached(times: Latency, after: float, speedup: float | None, at: tuple[int, int]) -> dict[str, Any]:
    """Return what the report says of time: what was asked for and reached, seconds before and after, and the table."""
    table = {kind: [[n, taken] for n, taken in rows] for kind, rows in times.blocks.items()}
    reached = {"speedup": [speedup, times.total / after], "seconds": [times.total, after]}
    return {"at": list(at), **reached, "block": table}


def _drawn(data: Any, batches: Sequence[Batch], seqlen: int, samples: int, sample: str, seed: int) -> dict[str, Any]:
    """Return what a recipe says of the calibration windows."""
    if not batches:
        return {}
    if isinstance(data, str | Path):
        return {"data": str(data), "seqlen": seqlen, "samples": samples, "sample": sample, "seed": seed}
    return {"data": "given", "samples": sum(len(next(iter(batch.values()))) for batch in batches)}
