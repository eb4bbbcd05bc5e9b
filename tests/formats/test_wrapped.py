"""Wrapped: its product against explicit matrices, what it takes, and damage that is found."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM as Pattern_NM
from gossamer.formats import NM, Wrapped


def made(
    out: int = 12,
    in_: int = 16,
    h: int = 4,
    w: int = 8,
    dtype: torch.dtype = torch.float32,
    pattern: Any = Pattern_NM(2, 4),  # noqa: B008
) -> tuple[Wrapped, Tensor]:
    """Return a weight, and the matrix it is, in float64."""
    generator = torch.Generator().manual_seed(out + in_)
    left, right = (torch.randn(n // b, b, b, generator=generator).to(dtype) for n, b in ((out, h), (in_, w)))
    mask = pattern.select(torch.rand(out, in_, generator=generator), None)
    core = (torch.randn(out, in_, generator=generator) * mask).to(dtype)
    whole = torch.block_diag(*left.double()) @ core.double() @ torch.block_diag(*right.double())
    return Wrapped.of(left, NM.pack(core, mask, pattern), right), whole


SIZES = [(12, 16, 4, 8), (4, 8, 4, 8), (6, 4, 1, 1), (6, 8, 3, 2), (8, 16, 2, 16)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kernel", ["auto", "portable", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_matrix(sizes: tuple[int, ...], kernel: str, dtype: torch.dtype) -> None:
    packed, whole = made(*sizes, dtype=dtype)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    assert packed.dense().dtype is dtype
    torch.testing.assert_close(packed.dense().double(), whole, **close)
    for lead in ((), (1,), (5,), (2, 3), (0,)):
        x = torch.randn(*lead, sizes[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        y = packed.linear(x, kernel)
        assert y.shape == (*lead, sizes[0])
        assert y.dtype is dtype
        torch.testing.assert_close(y.double(), x.double() @ whole.T, **close)
    strided = torch.randn(sizes[1], 7).T.to(dtype)
    torch.testing.assert_close(packed.linear(strided, kernel), packed.linear(strided.contiguous(), kernel))


def test_gradients_of_the_input_flow_through() -> None:
    packed, whole = made()
    x = torch.randn(3, 16, requires_grad=True)
    g = torch.randn(3, 12)
    packed.linear(x).backward(g)  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), g.double() @ whole, rtol=1e-4, atol=1e-4)


def test_what_it_takes_and_what_is_stored() -> None:
    packed, _ = made(dtype=torch.bfloat16)
    assert packed.tensors().keys() == {"left", "values", "positions", "right"}
    assert packed.bytes == 2 * (3 * 4 * 4 + 12 * 8 + 2 * 8 * 8) + 12 * 8 * 2 // 8
    again = Wrapped.read((12, 16), packed.tensors(), 2, 4)
    assert torch.equal(again.dense(), packed.dense())
    assert torch.equal(packed.core.dense(), again.core.dense())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"left": None}, "has no tensor 'left'"),
        ({"values": None}, "has no tensor 'values'"),
        ({"left": torch.ones(3, 4, 2)}, "left is 3 blocks of 4x2, and no 12x12"),
        ({"left": torch.ones(2, 4, 4)}, "left is 2 blocks of 4x4, and no 12x12"),
        ({"right": torch.ones(4, 8, 8)}, "right is 4 blocks of 8x8, and no 16x16"),
        ({"right": torch.ones(16, 16)}, "right must be anyxanyxany"),
        ({"right": torch.ones(2, 8, 8).half()}, "right is torch.float16, and its values are torch.float32"),
        ({"positions": torch.zeros(12, 2, dtype=torch.uint8)}, "positions are not 2 increasing ones below 4"),
    ],
)
def test_damage_is_found(change: dict[str, Tensor | None], words: str) -> None:
    packed, _ = made()
    tensors = {name: t for name, t in {**packed.tensors(), **change}.items() if t is not None}
    with pytest.raises(GossamerError, match=words):
        Wrapped.read((12, 16), tensors, 2, 4)


def test_no_matrix_is_packed_so_and_no_input_of_another_width_is_read() -> None:
    with pytest.raises(GossamerError, match="the format Wrapped holds factors, which no matrix tells"):
        Wrapped.pack(torch.eye(4), None, Pattern_NM(2, 4))
    with pytest.raises(GossamerError, match=r"the weight takes inputs \(\.\.\., 16\), not \(3, 15\)"):
        made()[0].linear(torch.ones(3, 15))
