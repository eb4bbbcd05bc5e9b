"""ScaleLoRA: every kept entry is scaled by an entry of a low-rank matrix."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.adapters._config import Method, SparseConfig, check_rank
from gossamer.adapters._linear import Adapter, lora_a


class ScaleLoRA(Adapter):
    """W' = W ⊙ (BA), with BA = 1 exactly at the start: B's first column and A's first row are ones, B is zero elsewhere."""

    def __init__(self, config: Any, w: Tensor) -> None:
        super().__init__(config, w)
        out, in_ = w.shape
        self.B = nn.Parameter(torch.cat([torch.ones(out, 1), torch.zeros(out, config.r - 1)], 1))
        self.A = nn.Parameter(torch.cat([torch.ones(1, in_), lora_a(config.r - 1, in_)]))

    @staticmethod
    def weight(w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return (b @ a) * w

    @staticmethod
    def gradients(g: Tensor, w: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        g = g.mul_(w)
        return g @ a.t(), b.t() @ g


@dataclass
class ScaleLoRAConfig(SparseConfig):
    """ScaleLoRA in peft: W' = W ⊙ (BA), a product of rank r that is 1 everywhere at the start.

    The authors start from B = A = 1/√r, where all r components have the same gradient and stay equal: the rank stays 1. Here
    B = [1 0 … 0] and A's first row is ones, the others as in LoRA, so that BA = 1 to the bit and the components differ.

    Args:
        r: the rank; B is (out, r), A is (r, in).
        target_modules, exclude_modules, modules_to_save: as in peft; by default every linear in the blocks that has zeros.

    Raises:
        GossamerError: an argument it does not take, or a rank below 1.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> ScaleLoRAConfig(r=8).r
    8
    """

    r: int = 16
    method: ClassVar[Method] = Method.SCALELORA
    adapter: ClassVar[type[Adapter]] = ScaleLoRA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r)
