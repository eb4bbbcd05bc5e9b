"""The product of an adapted linear, y = x·W'ᵀ + b, whose weight W' is made anew in the backward pass instead of being kept."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.adapters._mask import fingerprint


class Adapter(nn.Module, ABC):
    """An adapter of one weight W of shape (out, in). A method states W', and what a gradient of W' is to its parameters.

    Attributes:
        keeps: whether the zeros of W stay; False where the method chooses its own.
        exact: whether W' is still W' once it is merged.
        mask: the fingerprint of the zeros that the adapter was made on; saved with it.
    """

    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    mask: Tensor

    def __init__(self, config: Any, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", fingerprint(w))

    @staticmethod
    @abstractmethod
    def weight(w: Tensor, *parameters: Any) -> Tensor:
        """Return W', as the forward pass uses it."""

    @staticmethod
    @abstractmethod
    def gradients(g: Tensor, w: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
        """Return the parameters' gradients, given W's, which may be overwritten."""

    def constants(self, w: Tensor) -> tuple[Any, ...]:
        """Return what `weight` and `gradients` take after the parameters, tensors before numbers; nothing of it is trained."""
        return ()

    def effective(self, w: Tensor) -> Tensor:
        """Return W' by plain autograd: for several adapters at once, for merging, and for a W that trains too."""
        with torch.autocast(w.device.type, enabled=False):
            return self.weight(w, *cast(self.parameters(), w), *self.constants(w))

    def merged(self, w: Tensor) -> Tensor:
        """Return W' as it is merged: the zeros are W's, to the bit, whatever the adapter holds."""
        return torch.where(w != 0, self.effective(w), w)

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and w.requires_grad:
            return F.linear(x, self.effective(w), bias)
        parameters = tuple(self.parameters())
        apply: Any = Recomputed.apply  # torch leaves it without types
        product: Tensor = apply(x, w, bias, type(self), len(parameters), *parameters, *self.constants(w))
        return product

    def advance(self) -> None:
        """Count an optimizer step, where there is a schedule."""


class LowRank(Adapter):
    """W + s·BA, with s = alpha / r; B is (out, r) and zero at the start, A is (r, in)."""

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

    @staticmethod
    def gradients(g: Tensor, w: Tensor, b: Tensor, a: Tensor, s: float) -> tuple[Tensor, Tensor]:
        return (g @ a.t()).mul_(s), (b.t() @ g).mul_(s)


class Recomputed(torch.autograd.Function):
    """y = x·W'ᵀ + b. Nothing of W's size is saved; from G = dyᵀ·x, the gradient of W', follow those of the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, method: type[Adapter], count: int, *given: Any) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.method, ctx.count, ctx.dtype = method, count, dtype
        ctx.scalars = [thing for thing in given if not isinstance(thing, Tensor)]
        ctx.save_for_backward(x, w, *(thing for thing in given if isinstance(thing, Tensor)))
        with torch.autocast(device, enabled=False):
            weight = method.weight(w, *cast(given, w))
            return F.linear(x.to(dtype=dtype), weight.to(dtype=dtype), None if bias is None else bias.to(dtype=dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, w, *tensors = ctx.saved_tensors
        given, needs = [*cast(tensors, w), *ctx.scalars], ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            dx = dy @ ctx.method.weight(w, *given).to(dtype=ctx.dtype) if needs[0] else None
            rows = dy.reshape(-1, dy.shape[-1])
            found: tuple[Tensor | None, ...] = (None,) * ctx.count
            if any(needs[5:]):
                columns = x.to(dtype=ctx.dtype).reshape(-1, x.shape[-1])
                g = rows.t() @ columns if w.is_contiguous() else (columns.t() @ rows).t()  # stored as W is
                found = ctx.method.gradients(g.to(w.dtype), w, *given)
            rest = len(tensors) + len(ctx.scalars) - ctx.count
            return dx, None, rows.sum(0) if needs[2] else None, None, None, *found, *(None,) * rest


def cast(given: Any, w: Tensor) -> list[Any]:
    """Give the parameters W's dtype: they are small, W is not, and W' is rounded to it anyway once it is merged."""
    return [t.to(w.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]


def masked(t: Tensor, w: Tensor) -> Tensor:
    """Return M ⊙ t, where M = (W ≠ 0), in one pass and without a mask: it is what hardshrink's backward pass does at λ = 0."""
    found: Tensor = torch.ops.aten.hardshrink_backward(t, w.detach(), 0.0)
    return found


def plus_product(w: Tensor, b: Tensor, a: Tensor, s: float) -> Tensor:
    """Return W + s·BA, stored as W is (rows or columns first), so that later passes go through both in one order."""
    return torch.addmm(w, b, a, alpha=s) if w.is_contiguous() else torch.addmm(w.t(), a.t(), b.t(), alpha=s).t()


def lora_a(r: int, in_: int) -> Tensor:
    """Return A as LoRA starts it, of shape (r, in): uniform by Kaiming with a = √5, which is ±1/√in."""
    bound = 1 / math.sqrt(in_)
    return torch.empty(r, in_).uniform_(-bound, bound)
