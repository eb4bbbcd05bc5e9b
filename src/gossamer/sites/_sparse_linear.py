"""SparseLinear: the layer that stands where a linear stood, its weight in a packed format."""

from torch import Tensor, nn

from gossamer.core.format import Format


class SparseLinear(nn.Module):
    """y = x Wᵀ + b, W in a `Format`, for inference and for gradients of x.

    The format's tensors are buffers, so that `to`, `state_dict` and device maps treat them as any other; those that follow
    from others are not saved.

    Attributes:
        layout: the format's class.
        fixed: its fields that are no tensors: shape, and n and m for N:M.
        kernel: which implementation is asked for, "auto" or a name.
        transposed: the layer it stands for stored its weight as (in, out), as Conv1D does.

    >>> import torch
    >>> from gossamer.formats import Bitmask
    >>> linear = nn.Linear(4, 2)
    >>> SparseLinear(Bitmask.pack(linear.weight), linear.bias)(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    bias: Tensor | None

    def __init__(
        self, packed: Format, bias: nn.Parameter | None = None, *, kernel: str = "auto", transposed: bool = False
    ) -> None:
        super().__init__()
        self.layout, self.kernel, self.transposed = type(packed), kernel, transposed
        self.fixed = {k: v for k, v in vars(packed).items() if not isinstance(v, Tensor)}
        self.out_features, self.in_features = packed.shape
        stored = packed.tensors()
        for name, tensor in packed.tensors(derived=True).items():
            self.register_buffer(name, tensor, persistent=name in stored)
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> Format:
        """The weight as it is stored."""
        return self.layout(**self.fixed, **{name: t for name, t in self._buffers.items() if t is not None})

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed.linear(x, self.kernel)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        more = ", ".join(f"{k}={v}" for k, v in self.fixed.items() if k != "shape")
        told = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{told}, format={self.layout.__name__}" + (f", {more}" if more else "")
