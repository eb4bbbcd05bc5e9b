"""MaskLoRA: a low-rank update of the kept entries only."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.adapters._config import Method, SparseConfig, check_rank
from gossamer.adapters._linear import Adapter, lora_a, masked, plus_product


class MaskLoRA(Adapter):
    """W' = W + s·M⊙(BA), with M = (W ≠ 0) and s = alpha / r; B = 0 at the start."""

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
        return masked(plus_product(w, b, a, s), w)

    @staticmethod
    def gradients(g: Tensor, w: Tensor, b: Tensor, a: Tensor, s: float) -> tuple[Tensor, Tensor]:
        g = masked(g, w)
        return (g @ a.t()).mul_(s), (b.t() @ g).mul_(s)


@dataclass
class MaskLoRAConfig(SparseConfig):
    """MaskLoRA in peft: W' = W + (alpha / r)·M⊙(BA), where M marks the entries of W that are not zero.

    Args:
        r: the rank; B is (out, r), A is (r, in).
        alpha: the update is scaled by alpha / r.
        target_modules, exclude_modules, modules_to_save: as in peft; by default every linear in the blocks that has zeros.

    Raises:
        GossamerError: an argument it does not take (there is no dropout: it would act on a product that is never formed for one
            input alone), or a rank below 1.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> MaskLoRAConfig(r=8).alpha
    32
    """

    r: int = 16
    alpha: float = 32
    method: ClassVar[Method] = Method.MASKLORA
    adapter: ClassVar[type[Adapter]] = MaskLoRA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r)
