"""SPP: every kept entry is scaled by a row vector, shared by a group of outputs, times a factor of its own output."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.adapters._config import Method, SparseConfig, check_rank
from gossamer.adapters._linear import Adapter, lora_a
from gossamer.core.errors import GossamerError


class SPP(Adapter):
    """W' = W + s·W ⊙ (repeat(α)·β), α (r, in), β (out, 1) and 0 at the start; output i takes row ⌊i·r / out⌋ of α."""

    def __init__(self, config: Any, w: Tensor) -> None:
        super().__init__(config, w)
        out, in_ = w.shape
        if config.r > out:
            raise GossamerError(f"SPP shares each of r rows among outputs, so r is at most their number, {out}, not {config.r}")
        self.scale = config.alpha / config.r
        self.alpha = nn.Parameter(lora_a(config.r, in_))
        self.beta = nn.Parameter(torch.zeros(out, 1))

    def constants(self, w: Tensor) -> tuple[float]:
        return (self.scale,)

    @staticmethod
    def weight(w: Tensor, alpha: Tensor, beta: Tensor, s: float) -> Tensor:
        return torch.addcmul(w, w, alpha[_row_of(w, alpha)] * beta, value=s)

    @staticmethod
    def gradients(g: Tensor, w: Tensor, alpha: Tensor, beta: Tensor, s: float) -> tuple[Tensor, Tensor]:
        rows, g = _row_of(w, alpha), g.mul_(w)
        d_alpha = torch.zeros_like(alpha).index_add_(0, rows, g * beta, alpha=s)
        return d_alpha, (g * alpha[rows]).sum(1, keepdim=True).mul_(s)


def _row_of(w: Tensor, alpha: Tensor) -> Tensor:
    """Return which row of α each output takes: groups of out/r outputs that follow one another, or as equal as they can be."""
    return torch.arange(len(w), device=w.device) * len(alpha) // len(w)


@dataclass
class SPPConfig(SparseConfig):
    """SPP in peft: W' = W + (alpha / r)·W ⊙ (repeat(α)·β), where each of the r rows of α serves out/r outputs.

    Where r does not divide the outputs, the groups' sizes differ by one.

    Args:
        r: the number of rows of α.
        alpha: the update is scaled by alpha / r.
        target_modules, exclude_modules, modules_to_save: as in peft; by default every linear in the blocks that has zeros.

    Raises:
        GossamerError: an argument it does not take, a rank below 1 or above a weight's number of outputs.

    Source: SPP (Lu et al., 2024, arXiv:2405.16057).

    >>> SPPConfig(r=8).alpha
    32
    """

    r: int = 16
    alpha: float = 32
    method: ClassVar[Method] = Method.SPP
    adapter: ClassVar[type[Adapter]] = SPP

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r)
