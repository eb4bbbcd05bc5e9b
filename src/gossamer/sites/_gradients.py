"""Gradients of the next-token loss with respect to the targets, window by window through the whole model."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.sites._calibrate import Batch
from gossamer.sites._walk import Target


def gradients(
    model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target], *, each: bool = False
) -> dict[str, Tensor]:
    """Return ∂L/∂w of each target in float32, L the mean next-token loss over all windows; or ``each`` window's own, stacked.

    A gradient in the model's dtype lives only until its window's is added to the float32 sum, or kept in float32.
    """
    sums: dict[str, Any] = {}
    parameters = {target.name: getattr(target.module, target.attribute) for target in targets}
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    windows = sum(batch["input_ids"].shape[0] for batch in batches)

    def collect(name: str, parameter: Tensor) -> None:
        share = parameter.grad.to(torch.float32, copy=True)  # type: ignore[union-attr]
        if each:
            sums.setdefault(name, []).append(share)
        else:
            sums[name] = sums[name].add_(share) if name in sums else share
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            hook = lambda p, name=name: collect(name, p)  # noqa: E731
            stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        try:
            for batch in batches:
                for window in torch.split(batch["input_ids"], 1):
                    with torch.enable_grad():
                        loss = model(input_ids=window, labels=window, use_cache=False).loss
                        (loss if each else loss / windows).backward()
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(requires_grad[name])
    return {name: torch.stack(found) for name, found in sums.items()} if each else sums
