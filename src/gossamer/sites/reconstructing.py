"""Reconstruct: refit the kept weights of each block to what the dense block puts out, one block in work at a time."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.core.spec import spec
from gossamer.sites._calibrate import Batch
from gossamer.sites._inputs import batches_of
from gossamer.sites._pair import Pair, check, evaluating
from gossamer.sites._refit import Grid
from gossamer.sites._rows import describe, peak_bytes, row
from gossamer.sites.distilling import check_teacher
from gossamer.sites.weights import bar

INPUTS, PARTS = ("pruned", "dense"), ("block", "halves")


@spec
class Reconstruct:
    """Refit each block to the dense one's outputs: min ‖f(x; W ⊙ M) − f(x'; W')‖² / ‖f(x'; W')‖² over all that is kept.

    Attributes:
        epochs, batch, rate: passes over the windows, windows a step, Adam's rate.
        inputs: x, what a block is fitted on: "pruned", what the reconstructed blocks before it put out, so that it makes up for
            what these could not; or "dense", what it has in the dense model.
        parts: what is fitted at once: a "block", or its "halves", attention and then MLP: its children that hold weights.
        rank: fit updates of this rank to the pruned weights, W + M ⊙ (BA), instead of everything.
        bits, group: round the kept weights, straight through for gradients, to s·(q − z): q of so many bits, s and z of each
            group of so many inputs trained too (BQPO, the first stage of `GQSA`). Without them nothing is rounded.

    >>> Reconstruct(epochs=4)
    Reconstruct(epochs=4)
    """

    epochs: int = 8
    batch: int = 2
    rate: float = 1e-3
    inputs: str = "pruned"
    parts: str = "block"
    rank: int | None = None
    bits: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for name, value in {"epochs": self.epochs, "batch": self.batch, "rank": 1 if self.rank is None else self.rank}.items():
            if not isinstance(value, int) or value < 1:
                raise GossamerError(f"{name} is a positive integer, not {value!r}")
        if not self.rate > 0:
            raise GossamerError(f"rate is more than 0, not {self.rate!r}")
        if self.inputs not in INPUTS:
            raise GossamerError(f"inputs is {' or '.join(INPUTS)}, not {self.inputs!r}")
        if self.parts not in PARTS:
            raise GossamerError(f"parts is {' or '.join(PARTS)}, not {self.parts!r}")
        if (self.bits is None) != (self.group is None) or (self.bits is not None and self.rank is not None):
            raise GossamerError("bits and group go together, and without rank: Reconstruct(bits=4, group=16)")
        whole = all(number is None or type(number) is int for number in (self.bits, self.group))
        if not whole or self.bits not in (None, 2, 3, 4) or not (self.group is None or self.group > 0):
            raise GossamerError(f"bits are 2, 3 or 4, and group is a positive integer, not {self.bits!r} and {self.group!r}")

    @property
    def grid(self) -> Grid | None:
        """What weights are rounded to."""
        return None if self.bits is None or self.group is None else Grid(self.bits, self.group)

    def __call__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        batches: Sequence[Batch],
        *,
        seed: int = 0,
        targets: str | None = None,
        device: str | torch.device | None = None,
        progress: bool | None = None,
        start_at: int = 0,
        after_block: Callable[[int, list[dict[str, Any]]], None] | None = None,
    ) -> Report:
        """Reconstruct a model in place from the model's keyword arguments, a mapping a step; see `gossamer.reconstruct`.

        Args:
            start_at: the first block to refit; those before it are passed through as they are. A run that ended after some
                block, and goes on with the next on the weights it had, comes to the same bits.
            after_block: is given the index and the rows of each block that is done.
        """
        started = time.perf_counter()
        masks = check(model, teacher, batches, targets, self.grid)
        where = None if device is None else torch.device(device)
        rows: list[dict[str, Any]] = []
        with evaluating(model), evaluating(teacher), torch.no_grad():
            walk = Pair(self, model, teacher, batches, masks, where)
            with bar(walk.steps(start_at), repr(self), progress) as shown:

                def tell(error: float) -> None:
                    shown.set_postfix_str(f"error {error:.4f}", refresh=False)
                    shown.update()

                for index in range(walk.end):
                    if index >= start_at:
                        done = walk.refit(index, torch.Generator().manual_seed(seed + index), tell)
                        rows += done
                        if after_block:
                            after_block(index, done)
                    walk.go_on(index)
        return Report(
            kind="reconstruct",
            recipe={"method": repr(self), "seed": seed, "targets": targets, "batches": len(batches)},
            model=describe(model),
            weights=[row(target) for target in masks],
            blocks=rows,
            seconds={"refit": sum(r["seconds"] for r in rows), "total": time.perf_counter() - started},
            peak_bytes=peak_bytes(),
        )


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    *,
    data: str | Path | Tensor | Sequence[Batch] | None = None,
    tokenizer: Any = None,
    seqlen: int = 512,
    samples: int = 128,
    sample: str = "random",
    seed: int = 0,
    targets: str | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    epochs: int = Reconstruct.epochs,
    batch: int = Reconstruct.batch,
    rate: float = Reconstruct.rate,
    inputs: str = Reconstruct.inputs,
    parts: str = Reconstruct.parts,
    rank: int | None = Reconstruct.rank,
    bits: int | None = Reconstruct.bits,
    group: int | None = Reconstruct.group,
) -> Report:
    """Recover a pruned model without labels, in place and block by block, its zeros exact: see `Reconstruct` for the formula.

    One block is in work at a time, in float32: its weights, their gradients and Adam's two moments are all that is held beside
    the models and the windows' hidden states. Of every eight batches one is not trained on: by it a block's error is measured,
    and its old weights stay if the new ones are no better.

    Args:
        model: a transformers model with zeros in its weights.
        teacher: the dense original, another object of the same sizes.
        data, tokenizer, seqlen, samples, sample: as in `prune`; a mapping of the model's arguments is one step.
        seed: also of the order of the windows.
        targets: the weights whose zeros are kept, as in `prune`.
        device: where blocks are worked on, one of each model at a time; by default where the models are.
        progress: show a bar; by default only on a terminal.
        epochs, batch, rate, inputs, parts, rank, bits, group: see `Reconstruct`.

    Returns:
        A `Report` of kind "reconstruct": a row for each weight, and in ``blocks`` one for each block (or half): its error
        ``before`` and ``after``, ``steps``, ``seconds``, and ``raised``, the kept weights that were kept from rounding to zero.

    Raises:
        GossamerError: anything asked for that cannot be; the model is unchanged. If an error becomes NaN, the block is named
            and as it was, and those before it are reconstructed.

    Sources: Li et al., 2021, arXiv:2102.05426 (BRECQ: block by block); Guo et al., 2024, arXiv:2402.12419 (EBFT: of sparse
    language models); Zimmer et al., 2023, arXiv:2312.15230 (masked low rank).

    >>> import copy, gossamer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> seeded = torch.manual_seed(0)
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> dense, tokens = LlamaForCausalLM(tiny), torch.arange(64).reshape(4, 16)
    >>> model = copy.deepcopy(dense)
    >>> pruned = gossamer.prune(model, "Magnitude", "2:4")
    >>> report = reconstruct(model, dense, data=tokens, batch=1, rate=1e-3)
    >>> report.totals["sparsity"], all(block["after"] < block["before"] for block in report.blocks)
    (0.5, True)
    """
    method = Reconstruct(epochs, batch, rate, inputs, parts, rank, bits, group)
    if data is None:
        raise GossamerError("reconstruct needs calibration data: give data= a text file, token ids, or 'builtin'")
    check_teacher(model, teacher)
    folder, place = getattr(model, "name_or_path", ""), next(model.parameters()).device
    split = lambda ids: ids.split(method.batch)  # noqa: E731
    batches = batches_of(data, tokenizer, seqlen, samples, sample, seed, split, folder=folder, device=place)
    report = method(model, teacher, batches, seed=seed, targets=targets, device=device, progress=progress)
    if isinstance(data, str | Path):
        report.recipe |= {"data": str(data), "seqlen": seqlen, "samples": samples, "sample": sample}
    else:
        report.recipe["data"] = "given"
    return report
