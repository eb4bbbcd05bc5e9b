"""The layer that stands around an adapted linear in a peft model."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gossamer.adapters._linear import Adapter
from gossamer.adapters._mask import fingerprint
from gossamer.core.errors import GossamerError


class SparseLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear and its adapters. The base is unchanged until one is merged, and after `unmerge` again, to the bit.

    Attributes:
        name: the linear's name in the model.
        merges: what merging did, by the linear's name: entries that were kept, ``zeroed`` ones among them, and the part of the
            update that was ``dropped``. All layers of a model share it.
    """

    adapter_layer_names = ("gossamer_adapter",)
    active_adapters: Any  # peft's, a list of names

    def __init__(self, base_layer: nn.Module, name: str, merges: dict[str, dict[str, float]]) -> None:
        super().__init__()
        self.base_layer, self.name, self.merges = base_layer, name, merges
        self.gossamer_adapter = nn.ModuleDict()
        self._active_adapter: Any = []
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None

    @property
    def w(self) -> Tensor:
        """The base's weight as it is now, (out, in) however it is stored."""
        weight: Any = self.base_layer.weight
        found: Tensor = weight.t() if isinstance(self.base_layer, Conv1D) else weight
        return found

    def adapters(self, names: Sequence[str]) -> list[Adapter]:
        """Return the adapters of these names that this layer has."""
        return [self.gossamer_adapter[name] for name in names if name in self.gossamer_adapter]  # type: ignore[misc]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self.adapters(self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        w = self.w
        for adapter in active[:-1]:
            w = adapter.effective(w)
        return active[-1](x, w, self.base_layer.bias)

    @property
    def chooses(self) -> bool:
        """Tell whether an active adapter chooses its own zeros."""
        return not all(adapter.keeps for adapter in self.adapters(self.active_adapters))

    def is_changed(self, names: Sequence[str]) -> bool:
        """Tell whether the base has other zeros than those that one of these adapters was made on."""
        if not (adapters := self.adapters(names)):
            return False
        now = fingerprint(self.w if self._unmerged is None else self._unmerged)
        return any(not torch.equal(adapter.mask, now) for adapter in adapters)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        chosen = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.gossamer_adapter]
        if self.is_changed(chosen):
            raise other_zeros([self.name])
        base = before = self.w.detach().clone()
        for name in chosen:
            (adapter,) = self.adapters([name])
            after = adapter.merged(before)
            if safe_merge and not bool(after.isfinite().all()):
                raise GossamerError(f"{self.name}: the adapter {name} has NaN or infinite values; nothing of it was merged")
            self._record(adapter, before, after)
            self.w.data.copy_(after)
            self.merged_adapters.append(name)
            before = after
        if chosen and self._unmerged is None:
            self._unmerged = base

    def _record(self, adapter: Adapter, before: Tensor, after: Tensor) -> None:
        record = {"kept": int(after.count_nonzero()), "zeroed": 0, "dropped": 0.0}
        if adapter.keeps:
            record["zeroed"] = int(before.count_nonzero()) - int(record["kept"])
        if not adapter.exact:
            trained = adapter.effective(before)
            update = float((trained - before).float().norm())
            record["dropped"] = float((trained - after).float().norm()) / update if update else 0.0
        self.merges[self.name] = record

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.w.data.copy_(self._unmerged)
        self._unmerged, self.merged_adapters = None, []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the linear alone, merged if asked to; peft calls this where it takes its layers away."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._unmerged = None
        return self.base_layer


def other_zeros(names: Sequence[str]) -> GossamerError:
    """Return the error of adapters on a base whose zeros are not those that they were made on."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return GossamerError(f"the adapter was made on other zeros than {shown} has: it fits the pruned model it was made on")
