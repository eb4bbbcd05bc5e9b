"""Grid: the values of a tile as small integers under one scale and one zero, fitted to values or found in them."""

from typing import Any

import torch
from torch import Tensor

# Steps in units of the last place, nearest first: the scale of values that were rounded is off by this at most.
NEAR = (0, 1, -1, 2, -2)
_BITS = {2: torch.int16, 4: torch.int32}


def tiles(matrix: Tensor, h: int, w: int) -> Tensor:
    """Return a matrix (..., out, in) by tiles, (..., out / h, in / w, h·w)."""
    return torch.unflatten(torch.unflatten(matrix, -1, (-1, w)), -3, (-1, h)).transpose(-3, -2).flatten(-2)


def untiled(found: Tensor, h: int, w: int) -> Tensor:
    """Undo `tiles`."""
    return torch.unflatten(found, -1, (h, w)).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def kept_tiles(matrix: Tensor, h: int, w: int) -> Tensor:
    """Return the mask of the tiles that hold anything, bool, of the matrix's shape: a kept entry may have been rounded to 0."""
    some = (tiles(matrix, h, w) != 0).any(-1, keepdim=True)
    return untiled(some.expand(*some.shape[:-1], h * w), h, w)


def fitted(values: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero of each tile, float32 (..., 1): s = (max − min) / (2^bits − 1), z = round(−min / s).

    0 is among the values, so that it is on the grid and z in [0, 2^bits). The scale is rounded to bfloat16, and to the dtype in
    which the values will be (float16 has fewer small numbers): what is cast stays on its grid.

    Args:
        values: (..., entries of a tile).
        dtype: the model's.
    """
    values, top = values.float(), 2**bits - 1
    low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top).bfloat16().to(dtype).float()
    scale = scale.where(scale > 0, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, top)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return s·(q − z), q = clamp(round(w / s) + z, 0, 2^bits − 1), in float32; gradients go straight through the rounding.

    >>> rounded(torch.tensor([0.24, -0.1, 0.6]), torch.tensor([0.25]), torch.tensor([0.0]), 2)
    tensor([0.2500, 0.0000, 0.5000])
    """
    return scale * (straight(values / scale) + zero).clamp(0, 2**bits - 1).sub(zero)


class _Rounding(torch.autograd.Function):
    """Rounding whose gradient is that of its argument: straight through."""

    @staticmethod
    def forward(context: Any, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return x.round() if dtype is None else x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(context: Any, *above: Any) -> tuple[Any, None]:
        return above[0], None


def straight(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round to whole numbers, or to those of a dtype; the gradient goes straight through."""
    out: Tensor = _Rounding.apply(x, dtype)  # type: ignore[no-untyped-call]
    return out


def moved(scale: Tensor, zero: Tensor, grown: Tensor, shifted: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a grid as training has moved it: s·exp(``grown``), z + (2^bits − 1)·``shifted``, rounded, straight through.

    What is trained is small and without unit, so that an optimizer's rate means the same for both, and for every group. The
    scale is rounded as `fitted` does; one that would become 0 stays what it was.
    """
    top = 2**bits - 1
    found = straight(straight(scale * grown.exp(), torch.bfloat16), dtype)
    return found.where(found > 0, scale), straight(zero + top * shifted).clamp(0, top)


def found(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find for each tile a grid whose points, rounded to the values' dtype, are its values to the bit (of zeros, not the sign).

    Values that `rounded` gave, cast to any dtype that has their scale, are always found; not always on the same grid.

    Args:
        values: (tiles, entries), bfloat16, float16 or float32.

    Returns:
        q, uint8 (tiles, entries); s, the values' dtype (tiles,); z, uint8 (tiles,); and which tiles have a grid, bool (tiles,).
    """
    top, dtype = 2**bits - 1, values.dtype
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    scale, zero = values.new_ones(len(values)), codes.new_zeros(len(values))
    if not values.numel():
        return codes, scale, zero, torch.ones_like(zero, dtype=torch.bool)
    size = values.float().amax(1).clamp_min(0) - values.float().amin(1).clamp_max(0)
    done = (values == 0).all(1)
    left = (~done).nonzero()[:, 0]
    # From the lowest to the highest point of a tile it is so many steps; nearly always all there are.
    for steps, ulps in ((steps, ulps) for steps in range(top, 0, -1) for ulps in NEAR):
        if not len(left):
            break
        own = values[left]
        s = (size[left] / steps).to(dtype).view(_BITS[dtype.itemsize]).add(ulps).view(dtype)
        k = (own.float() / s.float()[:, None]).round()
        z = (-k.amin(1)).clamp_min(0)
        fits = ((k * s.float()[:, None]).to(dtype) == own).all(1) & (k.amax(1) + z <= top) & (z <= top) & (s > 0)
        at = left[fits]
        codes[at], scale[at], zero[at] = (k + z[:, None])[fits].to(torch.uint8), s[fits], z[fits].to(torch.uint8)
        done[at] = True
        left = left[~fits]
    return codes, scale, zero, done


def held(values: Tensor) -> torch.dtype:
    """Return the dtype that values were rounded to: one of 16 bits that has all of them, or else their own.

    What was trained in float32, or is loaded for it, may come from a checkpoint of 16 bits.
    """
    return next((d for d in (torch.bfloat16, torch.float16) if bool((values.to(d) == values).all())), values.dtype)


def refound(values: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and zero as `fitted` does, but the grid that a tile's values lie on already where there is one.

    A grid fitted to values of another that do not reach both of its ends is a narrower one, and rounds them again.
    """
    scale, zero = fitted(values, bits, dtype)
    flat = values.flatten(0, -2).to(dtype)
    _, own, at, on = found(flat, bits)
    on &= (own.float().bfloat16() == own.float()) & (flat != 0).any(1)
    there = on.view(*values.shape[:-1], 1)
    return own.float().view_as(scale).where(there, scale), at.float().view_as(zero).where(there, zero)
