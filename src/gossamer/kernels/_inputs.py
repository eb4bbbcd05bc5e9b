"""The inputs of a product, as every implementation takes them."""

import math

from torch import Tensor

from gossamer.core.errors import GossamerError


def flat(x: Tensor, columns: int) -> Tensor:
    """Return x of shape (..., columns) as (batch, columns).

    Raises:
        GossamerError: x is of another width, and the product would read beyond it.
    """
    if x.shape[-1:] != (columns,):
        raise GossamerError(f"the weight takes inputs (..., {columns}), not {tuple(x.shape)}")
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), columns)
