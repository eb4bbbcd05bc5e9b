"""Swap: sparse layers in the place of a model's linears."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gossamer.core.format import Format
from gossamer.sites._sparse_linear import SparseLinear
from gossamer.sites._walk import Target


def swap_in(model: nn.Module, layouts: Mapping[Target, Format], kernel: str = "auto") -> None:
    """Put a `SparseLinear` in the place of each target's linear, in place."""
    from gossamer.hf import mark

    for target, packed in layouts.items():
        bias: Any = target.module.bias
        layer = SparseLinear(packed, bias, kernel=kernel, transposed=target.transposed)
        layer.to(target.parameter.device)  # it may have been made elsewhere
        model.set_submodule(target.name.removesuffix(".weight"), layer.train(target.module.training))
    if layouts:
        mark(model)
