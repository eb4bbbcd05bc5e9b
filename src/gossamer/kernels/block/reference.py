"""x Wᵀ for tiles, said plainly: any device, any dtype, gradients of x and of the values."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_of

from gossamer.core.grid import untiled


def linear(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x Wᵀ, (batch, out), W made dense in float32."""
    _, h, w = values.shape
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=values.device), offsets.diff())
    own = values.float().flatten(1)
    dense = own.new_zeros(shape[0] // h, shape[1] // w, h * w).index_put((row, columns.long()), own)
    return linear_of(x.float(), untiled(dense, h, w)).to(x.dtype)
