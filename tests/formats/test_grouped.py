"""Grouped: back to the bit from what GQSA leaves, sizes as promised, what is refused, and damage that is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES
from gossamer.core.grid import fitted, rounded, tiles, untiled
from gossamer.core.pattern import NM, Block, Unstructured
from gossamer.formats import Grouped


def on_grid(rows: int, columns: int, h: int, w: int, dtype: torch.dtype, sparsity: float = 0.5, bits: int = 4) -> Tensor:
    """Return a random weight as GQSA leaves one; the first row of tiles is empty where something is pruned."""
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    mask = torch.zeros(rows, columns, dtype=torch.bool) if sparsity == 1 else Block(h, w).select(dense.abs(), sparsity)
    if sparsity:
        mask[:h] = False
    own = tiles(dense * mask, h, w)
    return untiled(rounded(own, *fitted(own, bits, dtype), bits), h, w).to(dtype)


SIZES = [
    (3, 32, 1, 16),
    (17, 9 * 16, 1, 16),
    (12, 40, 1, 8),
    (6, 12, 2, 3),
    (9, 15, 3, 5),
    (8, 7, 4, 1),
    (4, 0, 1, 16),
    (0, 16, 1, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_it_comes_back_to_the_bit(size: tuple[int, int, int, int], dtype: torch.dtype, sparsity: float) -> None:
    rows, columns, h, w = size
    for bits in (4, 2):
        dense = on_grid(*size, dtype, sparsity, bits)
        for given in (dense, dense.T.contiguous().T):
            packed = Grouped.pack(given, None, Block(h, w))
            assert torch.equal(packed.dense(), dense)
            assert packed.dense().dtype is packed.dtype is dtype
            assert packed.nnz == int(dense.count_nonzero())
        kept = len(packed.values)
        assert packed.bytes == kept * (-(-h * w // 2) + dtype.itemsize + 1 + 2) + 8 * (rows // h + 1)
        again = Grouped.read((rows, columns), packed.tensors(), h, w)
        for name, tensor in packed.tensors(derived=True).items():
            assert torch.equal(tensor, again.tensors()[name]), name
            assert tensor.is_contiguous(), name


def test_at_half_it_takes_a_fifth_of_the_dense_bytes() -> None:
    packed = Grouped.pack(on_grid(64, 1024, 1, 16, torch.bfloat16, 0.5), pattern=Block(1, 16))
    assert len(packed.values) < 2048
    assert packed.bytes <= 0.21 * 64 * 1024 * 2  # (8 + 2 + 1 + 2) bytes of 16 entries, half of them, and 8 a row


def test_by_hand() -> None:
    # 1x3 tiles of odd size: s = 0.25, z = 1: codes 0 1 3, two bytes: 3 above 0, and 1.
    packed = Grouped.pack(torch.tensor([[0.0, 0.0, 0.0, -0.25, 0.0, 3.5]]), pattern=Block(1, 3))
    assert packed.values.tolist() == [[0xF0, 0x01]]
    assert (packed.scale.tolist(), packed.zero.tolist(), packed.columns.tolist()) == ([0.25], [1], [1])
    assert packed.offsets.tolist() == [0, 1]


def test_what_is_on_no_grid_is_refused() -> None:
    dense = torch.randn(4, 32)
    with pytest.raises(GossamerError, match="8 of 8 tiles of 1x16 are on no grid of 4 bits: the format Grouped wants weights"):
        Grouped.pack(dense, pattern=Block(1, 16))
    good = on_grid(4, 32, 1, 16, torch.float32, 0.0)
    good[2, 5] += 1e-4
    with pytest.raises(GossamerError, match="1 of 8 tiles of 1x16 are on no grid"):
        Grouped.pack(good, pattern=Block(1, 16))


def test_other_mistakes_are_refused() -> None:
    for pattern in (None, Unstructured(), NM(2, 4)):
        with pytest.raises(GossamerError, match="such as 1x16, not"):
            Grouped.pack(torch.zeros(4, 16), None, pattern)
    with pytest.raises(GossamerError, match="columns that 16 divides"):
        Grouped.pack(torch.zeros(4, 24), None, Block(1, 16))
    with pytest.raises(GossamerError, match="up to 32,767 tiles beside one another, not 40,000"):
        Grouped.pack(torch.zeros(1, 40000), None, Block(1, 1))
    with pytest.raises(GossamerError, match="supported are bfloat16, float16, float32"):
        Grouped.pack(torch.zeros(4, 16, dtype=torch.float64), None, Block(1, 16))
    with pytest.raises(GossamerError, match="outside the mask are not zero"):
        Grouped.pack(torch.ones(4, 16), torch.zeros(4, 16, dtype=torch.bool), Block(1, 16))


def _set(name: str, at: Any, to: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].__setitem__(at, to)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a zero too high": (_set("zero", 3, 16), "has the zero 16, which is not of 4 bits"),
    "an entry too many": (_set("values", (0, -1), 0x11), "hold more than their 3x5 entries"),
    "a column too far": (_set("columns", -1, 5), "do not rise below 5"),
    "a negative column": (_set("columns", 0, -1), "do not rise below 5"),
    "unsorted columns": (lambda t: t["columns"].copy_(t["columns"].flip(0)), "do not rise"),
    "offsets that fall": (_set("offsets", 1, 100), "offsets do not rise"),
    "a first offset": (_set("offsets", 0, 1), "offsets do not rise"),
    "a last offset": (_set("offsets", -1, 1), "offsets do not rise"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind: str) -> None:
    damage, words = DAMAGE[kind]
    tensors = Grouped.pack(on_grid(12, 25, 3, 5, torch.float32), pattern=Block(3, 5)).tensors()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    damage(tensors)
    with pytest.raises(GossamerError, match=words):
        Grouped.read((12, 25), tensors, 3, 5)


def test_a_tensor_that_is_missing_or_misfits_is_named() -> None:
    whole = Grouped.pack(on_grid(12, 25, 3, 5, torch.float32), pattern=Block(3, 5)).tensors()
    for name, tensor in whole.items():
        with pytest.raises(GossamerError, match=f"no tensor '{name}'"):
            Grouped.read((12, 25), {k: t for k, t in whole.items() if k != name}, 3, 5)
        for misfit in (torch.cat([tensor, tensor[-1:]]), tensor[:-1], tensor[None], tensor.double()):
            with pytest.raises(GossamerError, match="packed weight"):
                Grouped.read((12, 25), whole | {name: misfit}, 3, 5)
    for shape, h, w in (
        ((25, 12), 3, 5),
        ((12, 20), 3, 5),
        ((15, 25), 3, 5),
        ((12, 25), 1, 5),
        ((12, 25), 0, 5),
        ((12, 24), 3, 4),
    ):
        with pytest.raises(GossamerError):
            Grouped.read(shape, whole, h, w)
