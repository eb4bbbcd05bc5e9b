"""What comes out of training: the checks of its zeros, the dtype it goes back to, and what is kept of a run that broke."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.recovering._loop import Broken, Plan
from gossamer.sites._job import pattern_of
from gossamer.sites._walk import Target
from gossamer.sites.checkpoint import save
from gossamer.sites.packing import LEAST


def masks_of(chosen: Sequence[Target], method: str, shrunk: bool, group: int | None = None) -> dict[str, Tensor]:
    """Return the masks of the weights that are pruned: those with zeros (or groups of them), and not only zeros.

    Of a dense model that was shrunk there are none.

    Raises:
        GossamerError: the model is as good as dense (some zeros are in any weight that was rounded), and was not shrunk.
    """
    kept = {target.name: target.kept(group) for target in chosen}
    zeros = 1 - sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values())
    if zeros < LEAST and shrunk:  # what was removed cannot come back: all that is left is trained
        return {}
    if zeros < LEAST:
        raise GossamerError(
            f"only {zeros:.2%} of the weights are zero, and {method} is to keep zeros: prune the model first (gossamer prune), "
            "or fine-tune it as any dense one (peft's LoRA)"
        )
    return {name: mask for name, mask in kept.items() if 0 < int(mask.sum()) < mask.numel()}


def check_zeros(chosen: Sequence[Target], masks: Mapping[str, Tensor]) -> None:
    """Raise unless every weight is zero wherever its mask is False."""
    lost = {t.name: int((t.parameter.ne(0) & ~masks[t.name]).sum()) for t in chosen if t.name in masks}
    if bad := [f"{name} ({count:,})" for name, count in lost.items() if count]:
        raise GossamerError(f"{len(bad)} of {len(masks)} weights lost zeros: {', '.join(bad[:3])}")


def cast(model: nn.Module, chosen: Sequence[Target], dtype: torch.dtype) -> int:
    """Cast a model in place, and return how many kept weights became zero by it."""
    before = sum(int(target.parameter.count_nonzero()) for target in chosen)
    model.to(dtype)
    return before - sum(int(target.parameter.count_nonzero()) for target in chosen)


def stopped(error: Broken, out: Path, tokenizer: Any, dtype: torch.dtype, plan: Plan) -> GossamerError:
    """Save the model as it was before the step that broke, beside ``out``, and return the line that says so."""
    told = f"{error} (learning rate {plan.rate:g})"
    if not error.step:
        return GossamerError(f"{told}, before anything was learnt; nothing is written")
    names = (f"{out.name}-step-{error.step}" + (f"-{again}" if again else "") for again in itertools.count())
    at = next(path for path in map(out.with_name, names) if not path.exists())
    model = error.tuning.finish().to(dtype).eval()
    save(model, at, tokenizer=tokenizer)
    return GossamerError(f"{told}; the model after step {error.step} is in {at}: go on from there with a lower rate")


def command_of(recipe: Mapping[str, Any], out: Path) -> str:
    """Return the shell command that trains by this recipe."""
    words = ["gossamer", "recover", recipe["source"], "--method", recipe["method"]]
    if recipe["chooses"]:
        words += ["--pattern", recipe["pattern"]]
        words += ["--sparsity", str(recipe["sparsity"])] if pattern_of(recipe["pattern"]).takes_sparsity else []
    options = ("teacher", "loss", "data", "seqlen", "steps", "batch", "micro", "rate", "seed", "targets")  # None: not given
    words += [word for option in options if recipe[option] is not None for word in (f"--{option}", str(recipe[option]))]
    return shlex.join([*words, "--out", str(out)])
