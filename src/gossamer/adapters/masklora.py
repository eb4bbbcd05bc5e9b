"""MaskLoRA: a low-rank update of the kept entries only."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.adapters._config import LowRankConfig, Method
from gossamer.adapters._linear import Adapter, LowRank, masked


class MaskLoRA(LowRank):
    """W' = W + s·M⊙(BA), with M = (W ≠ 0) and s = alpha / r; B = 0 at the start."""

    @staticmethod
    def weight(w: Tensor, b: Tensor, a: Tensor, s: float) -> Tensor:
        return masked(LowRank.weight(w, b, a, s), w)

    @staticmethod
    def gradients(g: Tensor, w: Tensor, b: Tensor, a: Tensor, s: float) -> tuple[Tensor, Tensor]:
        return LowRank.gradients(masked(g, w), w, b, a, s)


@dataclass
class MaskLoRAConfig(LowRankConfig):
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

    method: ClassVar[Method] = Method.MASKLORA
    adapter: ClassVar[type[Adapter]] = MaskLoRA
