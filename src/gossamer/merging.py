"""Merge: an adapter that does not know of zeros, into a pruned model, and the zeros put back."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.sites._inputs import check_batches
from gossamer.sites._rows import describe


def merge(
    model: nn.Module, *, keep: str = "mask", data: Tensor | Iterable[Mapping[str, Any]] | None = None
) -> tuple[nn.Module, Report]:
    """Merge a peft model's active adapters (LoRA, DoRA, ours) and put the base's zeros back: W ← M ⊙ (W + ΔW), M = (W ≠ 0).

    An ordinary adapter was trained together with the entries that are dropped here, so the result is not the model that was
    trained. What that costs is in the report's rows: ``weight_error``, ‖W_full − W_masked‖ / ‖W_full‖, and, with ``data``,
    ``output_error``, ‖(W_full − W_masked)·X‖ / ‖W_full·X‖, where X is the weight's input in the model as it was trained.

    Args:
        model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned, on a pruned base.
        keep: "mask", the zeros; to let them go, peft's own ``merge_and_unload`` is there.
        data: token ids (samples, seqlen), or mappings of the model's arguments.

    Returns:
        The plain model, and a `Report` of kind "merge", a row for each adapted weight; ``zeroed`` counts the kept entries that
        rounding made zero.

    Raises:
        GossamerError: no peft model, one that is merged already or whose base has no zeros; nothing was changed.

    >>> import gossamer, peft
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> pruned = LlamaForCausalLM(tiny)
    >>> report = gossamer.prune(pruned, "Magnitude", "2:4")
    >>> tuned = peft.get_peft_model(pruned, peft.LoraConfig(target_modules="all-linear"))
    >>> plain, report = gossamer.merge(tuned)
    >>> report.totals["sparsity"], max(row["weight_error"] for row in report.weights)
    (0.5, 0.0)
    """
    started = time.perf_counter()
    if keep != "mask":
        raise GossamerError(f"keep='mask' is what there is, not {keep!r}; to let the zeros go, use model.merge_and_unload()")
    weights = _adapted(model)
    batches = _batches(model, data)
    configs: Any = model.peft_config
    method = ", ".join(f"{name}: {config.peft_type.value}" for name, config in configs.items())
    plain = _merged(model, weights)
    if batches:
        _run(plain, weights, batches)
    rows = [weight.masked() for weight in weights]
    return plain, Report(
        kind="merge",
        recipe={"adapter": method, "keep": keep},
        model=describe(plain),
        weights=rows,
        seconds={"total": time.perf_counter() - started},
    )


@dataclass
class _Weight:
    """A linear with an adapter around it: its zeros, and what the update that falls on them adds to its output."""

    name: str
    layer: Any
    kept: Tensor = field(repr=False)  # as stored
    error: float = 0.0
    size: float = 0.0

    @property
    def linear(self) -> Any:
        return self.layer.get_base_layer()

    def see(self, linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add up, over one input, ‖(W_full − W_masked)·x‖² and ‖W_full·x‖²."""
        full = linear.weight.detach()
        for weight, name in ((full.masked_fill(self.kept, 0), "error"), (full, "size")):
            product = F.linear(inputs[0], weight if isinstance(linear, nn.Linear) else weight.t())
            setattr(self, name, getattr(self, name) + float(product.float().square().sum()))

    @torch.no_grad()
    def masked(self) -> dict[str, Any]:
        """Put the zeros back, and return the weight's row."""
        w = self.linear.weight.data
        gone = float(w.masked_fill(self.kept, 0).float().norm())
        whole = float(w.float().norm())
        w.masked_fill_(~self.kept, 0)
        nnz = int(w.count_nonzero())
        row = {"name": self.name, "shape": list(w.shape), "sparsity": 1 - nnz / w.numel(), "nnz": nnz}
        row |= {"zeroed": int(self.kept.sum()) - nnz, "weight_error": gone / whole if whole else 0.0}
        return row | ({"output_error": (self.error / self.size) ** 0.5} if self.size else {})


def _adapted(model: nn.Module) -> list[_Weight]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    from gossamer.adapters._layer import SparseLayer

    if not hasattr(model, "merge_and_unload") or not hasattr(model, "peft_config"):
        raise GossamerError(f"merge wants a peft model, with its adapters in it, not a {type(model).__name__}")
    weights = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(linear := layer.get_base_layer(), nn.Linear | Conv1D):
            if layer.merged:
                raise GossamerError(
                    "the adapters are merged already: model.unmerge_adapter() first, so that the zeros can be seen"
                )
            if not linear.weight.is_floating_point():
                raise GossamerError(f"{name} is quantized: merge into a base in float32, bfloat16 or float16")
            kept = linear.weight.detach() != 0
            weights.append(_Weight(f"{name.removeprefix('base_model.model.')}.weight", layer, kept))
    if any(isinstance(weight.layer, SparseLayer) and weight.layer.chooses for weight in weights):
        raise GossamerError("this adapter chooses its own zeros: model.merge_and_unload() makes them")
    if any(isinstance(weight.layer, SparseLayer) for weight in weights):
        model.base_model.check_zeros()  # type: ignore[operator, union-attr]
    if all(bool(weight.kept.all()) for weight in weights):
        raise GossamerError(f"none of the {len(weights)} adapted weights has zeros to keep: model.merge_and_unload() merges it")
    return weights


def _batches(model: Any, data: Tensor | Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """Return the model's arguments, a sequence at a time where token ids are given."""
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.is_floating_point():
            raise GossamerError(f"token ids are integers of shape (samples, seqlen); got {data.dtype} {tuple(data.shape)}")
        place = next(model.parameters()).device
        data = [{"input_ids": row[None].to(place)} for row in data]
    batches = list(data or [])
    check_batches(model.get_base_model(), batches)
    return batches


@torch.no_grad()
def _merged(model: Any, weights: list[_Weight]) -> nn.Module:
    """Merge everything, zeros or not, and return the plain model."""
    from gossamer.adapters._layer import SparseLayer

    ours = [weight for weight in weights if isinstance(weight.layer, SparseLayer)]
    names = {module: name for name, module in model.named_modules()}
    for weight in ours:  # which would merge with the mask: here they become what was trained
        layer = weight.layer
        for adapter in layer.adapters(layer.active_adapters):
            layer.w.data.copy_(adapter.effective(layer.w.detach()))
        parent, _, child = names[layer].rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    plain: nn.Module = model.merge_and_unload()
    return plain


@torch.no_grad()
def _run(model: nn.Module, weights: list[_Weight], batches: list[Mapping[str, Any]]) -> None:
    """Send the data through the model as it was trained, and let every weight see its input."""
    hooks = [weight.linear.register_forward_hook(weight.see) for weight in weights]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
