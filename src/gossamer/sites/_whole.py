"""What is measured on the whole model at once: its loss, its Hessian's product with the gradient, and the flow of SynFlow."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.core.errors import GossamerError
from gossamer.core.stats import Stats
from gossamer.sites._bar import bar
from gossamer.sites._calibrate import Batch, forwarding
from gossamer.sites._gradients import each_window, gradients, wanting_gradients
from gossamer.sites._walk import Target, text_config

Whole = dict[str, dict[str, Tensor]]  # need → name of the target → a tensor of its parameter's shape, or several


def measured(
    model: nn.Module,
    needs: frozenset[str],
    batches: Sequence[Batch],
    targets: Sequence[Target],
    progress: bool | None = False,
) -> Whole:
    """Return what ``needs`` names of what only the whole model can tell: "grad", "square_grad", "hessian_grad", "synflow"."""
    found: Whole = {}
    if needs & {"grad", "hessian_grad"}:
        grads = gradients(model, batches, targets, progress=progress)
        if "hessian_grad" in needs:
            found["hessian_grad"] = hessian_gradients(model, batches, targets, grads, progress)
        if "grad" in needs:
            found["grad"] = grads
    if "square_grad" in needs:
        found["square_grad"] = gradients(model, batches, targets, squared=True, progress=progress)
    if "synflow" in needs:
        found["synflow"] = flow(model, targets)
    return found


def fill(target: Target, stats: Sequence[Stats], whole: Whole) -> list[Stats]:
    """Let the statistics of a target's matrices hold what was measured of it on the whole model, which keeps it no longer."""
    for need, tensors in whole.items():
        found = tensors.pop(target.name)
        stacked = found if target.stacked else found.unsqueeze(-3)
        matrices = (stacked.transpose(-1, -2) if target.transposed else stacked).unbind(-3)
        for known, part in zip(stats, matrices, strict=True):
            if need == "synflow":  # an entry that nothing flows through still goes after those that are gone
                part = part.clamp_min(1e-12 * part.max())
                if not bool(part.any()):  # the one position took another way: an expert it was not sent to
                    known.white, part = True, torch.ones_like(part)
            setattr(known, need, part)
    return list(stats)


def losses(model: nn.Module, batches: Sequence[Batch], tell: Callable[[], object] = lambda: None) -> list[Callable[[], float]]:
    """Return one function a window: the mean next-token loss on it, with the model's weights as they are when it is called.

    ``tell`` is called after each.
    """

    def evaluate(window: Tensor) -> float:
        with torch.no_grad():
            loss = float(model(input_ids=window, labels=window, use_cache=False).loss)
        tell()
        return loss

    return [partial(evaluate, window) for window in each_window(batches)]


def hessian_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    grads: Mapping[str, Tensor],
    progress: bool | None = False,
) -> dict[str, Tensor]:
    """Return H g of each target in float32: g the gradient of the mean loss over all targets, H its Hessian over them.

    H g = Σ over windows of ∂(gᵀ ∂L/∂w)/∂w with g held constant, by a backward pass through the backward pass.
    """
    windows = list(each_window(batches))
    sums = {target.name: torch.zeros_like(target.parameter, dtype=torch.float32) for target in targets}
    # That attention is the one that has a second derivative.
    with (
        wanting_gradients(model, targets) as parameters,
        sdpa_kernel(SDPBackend.MATH),
        bar(len(windows), "second derivatives", progress) as shown,
    ):
        weights = list(parameters.values())
        for window in windows:
            loss = model(input_ids=window, labels=window, use_cache=False).loss / len(windows)
            first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            known = [(g, grads[name]) for g, name in zip(first, parameters, strict=True) if g is not None]
            along = torch.stack([(g.float() * direction).sum() for g, direction in known]).sum()
            second = torch.autograd.grad(along, weights, allow_unused=True)
            for name, share in zip(parameters, second, strict=True):
                if share is not None:
                    sums[name] += share.float()
            shown.update()
    return sums


def flow(model: nn.Module, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return ∂R/∂|w| of each target in float32, R the sum of the outputs of the linearised model; see `SynFlow`.

    The model's weights are their absolute values for the while, and are put back to the bit.
    """
    parameters = list(model.parameters())
    values = [p.data for p in parameters]
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise GossamerError(f"{type(model).__name__} takes no embeddings (inputs_embeds), which SynFlow feeds it")
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    with wanting_gradients(model, targets) as weights, ExitStack() as stack:
        try:
            for p in parameters:
                p.data = p.data.abs()
            ones = torch.ones(1, 1, width, dtype=values[0].dtype, device=values[0].device)
            for module in model.modules():
                if replaced := _linear_form(module):
                    stack.enter_context(forwarding(module, replaced))
            stack.enter_context(_linear_attention(model))
            outputs = model(inputs_embeds=ones, use_cache=False)
            found = torch.autograd.grad(outputs[0].float().sum(), list(weights.values()), allow_unused=True)
        finally:
            for p, value in zip(parameters, values, strict=True):
                p.data = value
    return {
        name: torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
        for (name, p), g in zip(weights.items(), found, strict=True)
    }


def _linear_form(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return what stands for a norm or an activation in the linearised model; None for any other module."""
    kind = type(module)
    if "norm" in kind.__name__.lower():
        return lambda x: x / x.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    activation = kind.__module__ in ("transformers.activations", "torch.nn.modules.activation")
    if activation and "softmax" not in kind.__name__.lower() and not any(True for _ in module.parameters()):
        return lambda x: x
    return None


@contextmanager
def _linear_attention(model: nn.Module) -> Iterator[None]:
    """Let attention over the one position put out v·(q·k / q·k held constant), where the model asks transformers for it."""
    from transformers import AttentionInterface

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        logit = (q * k).sum(-1, keepdim=True)
        return (v * (logit / logit.detach().clamp_min(1e-12))).transpose(1, 2), None

    AttentionInterface.register("gossamer_flow", attention)
    asks = getattr(model, "_supports_attention_backend", False)
    configs: dict[int, Any] = {id(c): c for c in (model.config, text_config(model)) if asks}
    before = {key: c._attn_implementation for key, c in configs.items()}
    try:
        for c in configs.values():
            c._attn_implementation = "gossamer_flow"
        yield
    finally:
        for key, c in configs.items():
            c._attn_implementation = before[key]
