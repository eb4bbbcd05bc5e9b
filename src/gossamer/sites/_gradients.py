"""Gradients of the next-token loss with respect to the targets, window by window through the whole model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.sites._bar import bar
from gossamer.sites._calibrate import Batch, hooked
from gossamer.sites._walk import Target


def gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    *,
    each: bool = False,
    squared: bool = False,
    progress: bool | None = False,
) -> dict[str, Tensor]:
    """Return ∂L/∂w of each target in float32, L the mean next-token loss over all windows; or ``each`` window's own, stacked.

    With ``squared`` it is the mean over the windows of (∂L_n/∂w)², L_n a window's loss.

    A gradient in the model's dtype lives only until its window's is added to the float32 sum, or kept in float32. What the loss
    does not depend on, such as an expert that no token was sent to, has gradient zero.
    """
    sums: dict[str, Any] = {}
    windows = list(each_window(batches))

    def collect(name: str, parameter: Tensor) -> None:
        share = parameter.grad.to(torch.float32, copy=True)  # type: ignore[union-attr]
        if squared:
            share.square_().div_(len(windows))
        if each:
            sums.setdefault(name, []).append(share)
        else:
            sums[name] = sums[name].add_(share) if name in sums else share
        parameter.grad = None

    with (
        wanting_gradients(model, targets) as parameters,
        ExitStack() as stack,
        bar(len(windows), "gradients", progress) as shown,
    ):
        for name, parameter in parameters.items():
            handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(partial(collect, name))  # type: ignore[no-untyped-call]
            stack.enter_context(hooked(handle))
        for window in windows:
            loss = model(input_ids=window, labels=window, use_cache=False).loss
            if not bool(loss.isfinite()):
                raise GossamerError(f"the next-token loss on a window of {window.shape[1]} tokens is {loss.item()}")
            (loss if each or squared else loss / len(windows)).backward()
            shown.update()
    found: Mapping[str, Tensor] = {name: torch.stack(parts) for name, parts in sums.items()} if each else sums
    lead = (len(windows),) if each else ()
    return {t.name: found.get(t.name, torch.zeros(())).expand(*lead, *t.parameter.shape) for t in targets}


@contextmanager
def wanting_gradients(model: nn.Module, targets: Sequence[Target]) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters of the targets, the only ones that want gradients meanwhile."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    parameters = {target.name: getattr(target.module, target.attribute) for target in targets}
    try:
        for p in wanted:
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            yield parameters
    finally:
        for p, before in wanted.items():
            p.requires_grad_(before)


def each_window(batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield the token ids of every window, (1, seqlen).

    Raises:
        GossamerError: windows are padded: what the model says of the padding is nobody's next token.
    """
    for batch in batches:
        if not bool(batch.get("attention_mask", torch.ones(1)).all()):
            raise GossamerError("windows with padding have no next-token loss here: give windows of one length, without")
        yield from torch.split(batch["input_ids"], 1)
