"""LoRA-Prune: an ordinary LoRA while it trains, masked when it is merged."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from gossamer.adapters._config import LowRankConfig, Method
from gossamer.adapters._linear import Adapter, LowRank


class LoRAPrune(LowRank):
    """W' = W + s·BA in training, W + s·M⊙(BA) once merged: the two differ where W is zero."""

    exact: ClassVar[bool] = False

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        update = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scale
        product: Tensor = F.linear(x, w, bias)
        return product.add_(update.to(product.dtype))


@dataclass
class LoRAPruneConfig(LowRankConfig):
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

    method: ClassVar[Method] = Method.LORAPRUNE
    adapter: ClassVar[type[Adapter]] = LoRAPrune
