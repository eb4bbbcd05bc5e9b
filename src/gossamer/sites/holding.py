"""Hold the zeros of a pruned model while any optimizer trains it."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.sites._rows import describe
from gossamer.sites._walk import Target
from gossamer.sites._walk import targets as find_targets


def hold(model: nn.Module, optimizer: Optimizer, *, targets: str | None = None) -> "Hold":
    """Keep the zeros of a pruned model through every step of an optimizer: g ← g ⊙ m, step, w ← w ⊙ m, where m is w ≠ 0 now.

    Gradients are masked as they are accumulated, so that clipping sees what is kept, and again right before the step, so that
    the optimizer's state of pruned entries stays zero whatever was done to them between; the first step masks what stands in it
    already. The loop stays yours. Call it last: after DDP, ``fully_shard``, ``accelerator.prepare`` or ``torch.compile``.

    Args:
        model: a transformers model with zeros in its weights, wrapped or not; parameters may be DTensors.
        optimizer: the one that trains it, wrapped by accelerate or not. With several, hold the model once for each.
        targets: which weights, as in `prune`. Those without a zero, and those that are nothing but zeros, are left alone.

    Returns:
        The `Hold`: a context manager with ``check``, ``release``, ``state_dict`` and ``load_state_dict``.

    Raises:
        GossamerError: no weight has zeros, the optimizer updates none that has, or it is no torch optimizer.

    >>> import gossamer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> model = LlamaForCausalLM(tiny)
    >>> report = gossamer.prune(model, "Magnitude", "2:4")
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with hold(model, optimizer) as held:
    ...     loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    ...     loss.backward()
    ...     optimizer.step()
    >>> held.check().totals["sparsity"]
    0.5
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's wrapper has no hooks of its own
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    if not isinstance(optimizer, Optimizer):
        raise GossamerError(f"hold wants a torch.optim.Optimizer, or accelerate's around one, not a {type(optimizer).__name__}")
    return Hold(model, optimizer, targets)


class Hold:
    """The masks of a pruned model (True = kept, one byte an entry) and the hooks that apply them; made by `hold`.

    A kept weight that becomes exactly zero in training stays kept, and may move again. A new `hold` would take it for pruned:
    to go on with the very same bits, save ``state_dict()`` beside the optimizer's.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, targets: str | None) -> None:
        self._model, self._optimizer = _unwrapped(model), optimizer
        self._recipe = {"optimizer": type(optimizer).__name__, "targets": targets}
        self._steps, self._first = 0, True
        self._weights = _pruned(find_targets(self._model, targets), optimizer)
        self._hooks = [weight.on_gradient() for weight in self._weights if weight.trains]
        self._hooks += optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, *_: Any) -> None:
        updated = _updated_by(self._optimizer)
        for weight in self._weights:
            if id(weight.parameter) not in updated:
                raise GossamerError(
                    f"the optimizer no longer updates {weight.name}: its parameters were replaced, as fully_shard and "
                    "accelerator.prepare do; call hold after that"
                )
            weight.mask_gradient(weight.parameter)
        if self._first:  # not sooner: the masks may be loaded yet
            self._mask_state()
        self._first = False

    def _mask_state(self) -> None:
        for weight in self._weights:
            for state in self._optimizer.state.get(weight.parameter, {}).values():
                if isinstance(state, Tensor) and state.is_floating_point() and state.shape == weight.parameter.shape:
                    weight.mask_(state)

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        for weight in self._weights:
            if weight.trains:
                weight.mask_(weight.parameter)

    def check(self) -> Report:
        """Return a `Report` of kind "hold" with a row for each weight; under FSDP2 every rank has to ask.

        Raises:
            GossamerError: weights lost zeros (which, and how many).
        """
        rows, lost = [], []
        for weight in self._weights:
            nnz, gone = weight.count(weight.values != 0), weight.count((weight.values != 0) & ~weight.mask)
            shape = list(weight.parameter.shape)
            sparsity = 1 - nnz / weight.parameter.numel()
            rows.append({"name": weight.name, "shape": shape, "sparsity": sparsity, "nnz": nnz, "block": weight.block})
            if gone:
                lost.append(f"{weight.name} ({gone:,})")
        if lost:
            shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            raise GossamerError(
                f"{len(lost)} of {len(rows)} held weights lost zeros: {shown}; they are NaN, or something else wrote them"
            )
        recipe = {**self._recipe, "steps": self._steps}
        return Report(kind="hold", recipe=recipe, model=describe(self._model), weights=rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks (bool, DTensors where the weights are) by name, and the number of steps."""
        return {"steps": self._steps, "masks": {weight.name: weight.mask_like_parameter() for weight in self._weights}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the masks of an earlier hold on the same weights; load the model's weights first.

        Raises:
            GossamerError: other weights or shapes, or a weight that is not zero where its mask is; nothing was loaded.
        """
        masks, names = state["masks"], {weight.name for weight in self._weights}
        if differing := sorted(names ^ set(masks)):
            raise GossamerError(f"these masks are of another model: {differing[0]} is in one and not in the other")
        for weight in self._weights:
            mask = _local(masks[weight.name])
            if mask.shape != weight.mask.shape:
                found, held = tuple(mask.shape), tuple(weight.mask.shape)
                raise GossamerError(f"these masks are of another model: {weight.name} has shape {held}, its mask {found}")
            if moved := int(((weight.values != 0) & ~mask.to(weight.values.device)).sum()):
                raise GossamerError(
                    f"{weight.name} has {moved:,} entries that its mask holds at zero: load the weights saved with it first"
                )
        for weight in self._weights:
            weight.mask = _local(masks[weight.name]).to(weight.mask.device, copy=True)
        self._steps = state["steps"]

    def release(self) -> None:
        """Take the hooks away: the optimizer is as it was, and ``check`` still works."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
        if kind is None:
            self.check()

    def __repr__(self) -> str:
        kept = sum(weight.count(weight.mask) for weight in self._weights)
        size = sum(weight.parameter.numel() for weight in self._weights)
        state = f"{self._recipe['optimizer']}, step {self._steps}" if self._hooks else "released"
        return f"Hold({len(self._weights)} weights, sparsity {1 - kept / size:.4f}, {state})"


class _Weight:
    """A pruned parameter and the mask of the part of it that is on this rank."""

    def __init__(self, target: Target) -> None:
        self.name, self.block = target.name, target.block
        self.parameter: nn.Parameter = getattr(target.module, target.attribute)
        self.mask = self.values != 0

    @property
    def values(self) -> Tensor:
        return _local(self.parameter.detach())

    @property
    def trains(self) -> bool:
        return self.parameter.requires_grad

    @torch.no_grad()
    def mask_(self, tensor: Tensor) -> None:
        part = _local(tensor)
        if self.mask.device != part.device:  # the model was moved
            self.mask = self.mask.to(part.device)
        part.mul_(self.mask.view(torch.int8))  # on the CPU three times as fast as by bool, and ten as masked_fill_

    def mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.mask_(parameter.grad)

    def on_gradient(self) -> RemovableHandle:
        hooked: Any = self.parameter  # torch leaves this one method without types
        handle: RemovableHandle = hooked.register_post_accumulate_grad_hook(self.mask_gradient)
        return handle

    def count(self, flags: Tensor) -> int:
        """Count the True entries of all ranks."""
        from torch.distributed.tensor import DTensor, Partial

        found = flags.sum()
        if isinstance(self.parameter, DTensor):
            placements = [p if p.is_replicate() else Partial() for p in self.parameter.placements]
            found = DTensor.from_local(found, self.parameter.device_mesh, placements).full_tensor()
        return int(found)

    def mask_like_parameter(self) -> Tensor:
        """Return a copy of the mask, sharded as the parameter is: torch.distributed.checkpoint can save and reshard it."""
        from torch.distributed.tensor import DTensor

        mask, w = self.mask.clone(), self.parameter
        if not isinstance(w, DTensor):
            return mask
        return DTensor.from_local(mask, w.device_mesh, w.placements, shape=w.shape, stride=w.stride())


def _pruned(chosen: list[Target], optimizer: Optimizer) -> list[_Weight]:
    """Return the weights that have zeros, and not only zeros (which is how adapters start), and that the optimizer updates."""
    unique = {id(getattr(target.module, target.attribute)): target for target in chosen}
    weights = [_Weight(target) for target in unique.values()]
    weights = [weight for weight in weights if 0 < weight.count(weight.mask) < weight.parameter.numel()]
    if not weights:
        raise GossamerError(f"none of the {len(unique)} weights has zeros to hold: prune the model first, with gossamer.prune")
    updated = _updated_by(optimizer)
    held = [weight for weight in weights if id(weight.parameter) in updated]
    if not held:
        raise GossamerError(
            f"the optimizer updates none of the {len(weights)} pruned weights, so there is nothing to hold: make it from "
            "model.parameters() after fully_shard; an adapter on a frozen base leaves the zeros alone until it is merged"
        )
    return held


def _updated_by(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and torch.compile."""
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = inner
    return model


def _local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
