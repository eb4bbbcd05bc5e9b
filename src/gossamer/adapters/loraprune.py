"""LoRA-Prune: an ordinary LoRA while it trains, masked when it is merged."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.adapters._config import Method, SparseConfig, check_rank
from gossamer.adapters._linear import Adapter, lora_a, plus_product


class LoRAPrune(Adapter):
    """W' = W + s·BA in training, W + s·M⊙(BA) once merged: the two differ where W is zero."""

    exact: ClassVar[bool] = False

    def __init__(self, config: Any, w: Tensor) -> None:
        super().__init__(config, w)
        out, in_ = w.shape
        self.scale = config.alpha / config.r
        self.B = nn.Parameter(torch.zeros(out, config.r))
        self.A = nn.Parameter(lora_a(config.r, in_))

    def constants(self, w: Tensor) -> tuple[float]:
        return (self.scale,)

    @staticmethod
    def weight(w: Tensor, b: Tensor, a: Tensor, s: float) -> Tensor:
        return plus_product(w, b, a, s)

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        update = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scale
        product: Tensor = F.linear(x, w, bias)
        return product.add_(update.to(product.dtype))


@dataclass
class LoRAPruneConfig(SparseConfig):
    """LoRA-Prune in peft: y = x·(W + s·BA)ᵀ while it trains, W + s·M⊙(BA) once merged, with s = alpha / r.

    As fast as LoRA, and not the same model before and after merging: what the update put where W is zero is dropped. Merging
    warns of how much that is; `gossamer.merge` says how far the outputs move.

    Args:
        r: the rank; B is (out, r), A is (r, in).
        alpha: the update is scaled by alpha / r.
        target_modules, exclude_modules, modules_to_save: as in peft; by default every linear in the blocks that has zeros.

    Raises:
        GossamerError: an argument it does not take, or a rank below 1.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> LoRAPruneConfig(r=8).alpha
    32
    """

    r: int = 16
    alpha: float = 32
    method: ClassVar[Method] = Method.LORAPRUNE
    adapter: ClassVar[type[Adapter]] = LoRAPrune

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r)
