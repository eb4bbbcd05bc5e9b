"""LowRank: two thin linears where one stood."""

from typing import Any, Self

from torch import Tensor, nn

from gossamer.sites._coupling import shape_of


class LowRank(nn.Module):
    """y = A(Bx) + b, A of shape (out, r) and B of shape (r, in).

    Attributes:
        inner, outer: the linears of B and of A, which has the bias.

    >>> import torch
    >>> LowRank.blank(nn.Linear(6, 4), 2)(torch.ones(3, 6)).shape
    torch.Size([3, 4])
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    @classmethod
    def blank(cls, linear: Any, rank: int) -> Self:
        """Make the place for a linear's factors, on its device and in its dtype, to be filled."""
        (out, in_), like = shape_of(linear), {"device": linear.weight.device, "dtype": linear.weight.dtype}
        found = cls(nn.Linear(in_, rank, bias=False, **like), nn.Linear(rank, out, bias=linear.bias is not None, **like))
        if linear.bias is not None:
            found.outer.bias = linear.bias
        return found.train(linear.training)

    @classmethod
    def of(cls, linear: Any, outer: Tensor, inner: Tensor) -> Self:
        """Make what takes a linear's place, of its factors A and B."""
        found = cls.blank(linear, outer.shape[1])
        for factor, values in ((found.outer, outer), (found.inner, inner)):
            factor.weight = nn.Parameter(values.to(linear.weight).contiguous(), requires_grad=linear.weight.requires_grad)
        return found

    @property
    def rank(self) -> int:
        """What its width is, r."""
        return self.inner.out_features

    @property
    def weight(self) -> Tensor:
        """The product AB, for code that looks at a linear's weight; writing to it changes nothing."""
        return self.outer.weight @ self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.inner(x))
        return y
