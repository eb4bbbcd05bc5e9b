"""GQSA: one group rounded by hand, its saliency by explicit inverses, grids that are found again, and what it refuses."""

import itertools
from typing import Any

import pytest
import torch

from gossamer.core.errors import GossamerError
from gossamer.core.grid import fitted, found, kept_tiles, refound, rounded, tiles, untiled
from gossamer.core.pattern import Block
from gossamer.core.spec import parse
from gossamer.core.stats import Stats
from gossamer.solvers import GQSA, Asymmetric
from gossamer.tuners import OQP
from tests.test_solvers import hessian, layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def white(columns: int) -> Stats:
    """Inputs that leave the saliency to the weights."""
    stats = Stats(columns, gram=True)
    stats.add(torch.eye(columns))
    return stats


def test_one_group_by_hand() -> None:
    # max 1.0, min −0.875: s = 1.875 / 15 = 0.125, z = round(7) = 7. By 0.125: 8, −7, 2.4, −0.4, 3.6, −2.56, so q = 15, 0, 9,
    # 7, 11, 4. The second group has only positive weights: with 0 its range is 0 to 1.5, s = 0.1 in bfloat16, 0.10009765625.
    w = torch.tensor([[1.0, -0.875, 0.3, -0.05, 0.45, -0.32, 0.5, 1.5, 0.9, 0.72, 0.24, 1.31]])
    s = 0.10009765625
    by_hand = [1.0, -0.875, 0.25, 0.0, 0.5, -0.375, 5 * s, 15 * s, 9 * s, 7 * s, 2 * s, 13 * s]
    assert GQSA()(w, white(12), Block(1, 6), 0.0)[0].tolist() == [by_hand]
    codes, scale, zero, on = found(torch.tensor(by_hand).view(2, 6), 4)
    assert codes.tolist() == [[15, 0, 9, 7, 11, 4], [5, 15, 9, 7, 2, 13]]
    assert scale.tolist() == [0.125, s]
    assert zero.tolist() == [7, 0]
    assert on.all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kept_weight_is_further_from_itself_than_half_a_step(bits: int, dtype: torch.dtype) -> None:
    w = layer(16, 48)[0].to(dtype)
    rough, mask = GQSA(bits=bits)(w, white(48), Block(1, 16), 0.5)
    step = (w.float().view(16, 3, 16).amax(-1) - w.float().view(16, 3, 16).amin(-1)) / (2**bits - 1)
    off = (rough.float() - w.float()).abs().view(16, 3, 16) / step[..., None]
    # The zero is a whole number, which moves the ends of the grid by half a step; bfloat16's rounding comes on top.
    assert float(off[mask.view(16, 3, 16)].max()) < 1.0 + 2**-7 * 2**bits
    assert float(off[mask.view(16, 3, 16)].median()) < 0.3
    for row in rough.view(16, 3, 16)[mask.view(16, 3, 16).any(-1)]:
        assert len(set(row.tolist())) <= 2**bits


def test_the_groups_with_the_highest_saliency_stay() -> None:
    w, stats = layer(6, 24)
    inverse = torch.linalg.inv(hessian(stats, 0.01)).diagonal()
    sums = torch.zeros(6, 6)
    for i, g in itertools.product(range(6), range(6)):
        sums[i, g] = sum(float(w[i, j]) ** 2 / float(inverse[j]) ** 2 for j in range(4 * g, 4 * g + 4))
    best = sums.flatten().sort(descending=True).indices[:18]
    expected = torch.zeros(36, dtype=torch.bool).index_fill(0, best, True).view(6, 6).repeat_interleave(4, dim=1)
    kept, mask = GQSA(bits=None)(w, stats, Block(1, 4), 0.5)
    assert torch.equal(mask, expected)
    assert torch.equal(kept, w * expected)
    by_size = Block(1, 4).select(w.square(), 0.5)
    assert not torch.equal(mask, by_size), "the inputs have a say"
    assert torch.equal(mask, GQSA()(w, stats, Block(1, 4), 0.5)[1])


def test_a_dead_input_takes_no_room() -> None:
    stats = Stats(4, gram=True)
    x = torch.eye(4)
    x[1, 1] = 0
    stats.add(x)
    w = torch.tensor([[1.0, 1000.0, -0.5, 0.25]])
    s = 0.10009765625  # 1.5 / 15
    assert GQSA()(w, stats, Block(1, 4), 0.0)[0].tolist() == [[10 * s, 0.0, -5 * s, 2 * s]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_grid_is_found_again_in_any_dtype(dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for size in (1, 2, 16, 33):
        for spread in (1e-3, 0.02, 1.0, 300.0):
            shift = torch.randn(200, 1, generator=generator)
            values = spread * (torch.randn(200, size, generator=generator) + 0.5 * shift)
            scale, zero = fitted(values, bits, torch.bfloat16)
            # As training leaves them: codes of any kind, also such that use neither end.
            codes = torch.randint(0, 2**bits, values.shape, generator=generator).clamp_max(2**bits - 1 - (shift > 0).long())
            for made in (rounded(values, scale, zero, bits), scale * (codes - zero)):
                held = made.to(dtype)
                q, s, z, on = found(held, bits)
                assert on.all()
                assert s.dtype is dtype
                assert torch.equal(((q.float() - z.float()[:, None]) * s.float()[:, None]).to(dtype), held)
                assert int(q.max()) < 2**bits
                assert int(z.max()) < 2**bits


def test_what_is_on_no_grid_is_told() -> None:
    values = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    good = rounded(values, *fitted(values, 4, torch.bfloat16), 4)
    good[7, good[7].argmax()] *= 1 + 2**-20
    good[9] = values[9]
    good[11, 0] = float("nan")
    good[12] = 0
    assert (~found(good, 4)[3]).nonzero()[:, 0].tolist() == [7, 9, 11]
    assert not found(good[:7], 2)[3].any()
    assert found(values[:0], 4)[0].shape == (0, 16)


def test_tiles_and_back() -> None:
    matrix = torch.arange(2 * 24).view(2, 4, 6)
    assert tiles(matrix, 2, 3)[1, 0, 1].tolist() == [27, 28, 29, 33, 34, 35]
    assert torch.equal(untiled(tiles(matrix, 2, 3), 2, 3), matrix)
    some = torch.zeros(4, 6)
    some[1, 4] = 1
    assert kept_tiles(some, 2, 3).nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 3], [1, 4], [1, 5]]


def test_it_goes_inside_asymmetric() -> None:
    w, stats = layer(8, 32)
    stats.cross = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    kept, mask = Asymmetric(GQSA())(w.bfloat16(), stats, Block(1, 16), 0.5)
    assert found(tiles(kept, 1, 16).flatten(0, 1), 4)[3].all()
    assert not kept[~mask].any()


@pytest.mark.parametrize("more", [{"bits": 5}, {"bits": 1}, {"damp": 0.0}])
def test_numbers_that_cannot_be(more: dict[str, Any]) -> None:
    with pytest.raises(GossamerError, match="GQSA wants bits of 2, 3, 4 or None and damp > 0; got"):
        GQSA(**more)


def test_a_width_that_groups_do_not_divide() -> None:
    w, stats = layer(4, 24)
    with pytest.raises(GossamerError, match="1x16 needs rows that 1 divides and columns that 16 divides"):
        GQSA()(w, stats, Block(1, 16), 0.5)


@pytest.mark.parametrize("size", [2e-5, 1e-4, 1e-3, 1.0])
def test_small_values_in_float16_are_on_a_grid_too(size: float) -> None:
    values = size * torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    half = rounded(values, *fitted(values, 4, torch.float16), 4).half()
    assert found(half, 4)[3].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_on_a_grid_is_not_rounded_again(dtype: torch.dtype, bits: int) -> None:
    values = 0.02 * torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    once = rounded(values, *fitted(values, bits, dtype), bits).to(dtype).float()
    again = rounded(once, *refound(once, bits, dtype), bits).to(dtype).float()
    assert torch.equal(once, again)
    assert not torch.equal(once, rounded(once, *fitted(once, bits, dtype), bits).to(dtype).float()), "a fitted grid is another"


@pytest.mark.parametrize(
    "method", ["GQSA(bits=5)", "GQSA(bits=4.0)", "GQSA(damp=1e999)", "OQP(bits=4.0)", "OQP(group=True)", "OQP(group=0)"]
)
def test_numbers_that_make_no_grid(method: str) -> None:
    with pytest.raises(GossamerError, match=r"(GQSA|OQP) wants bits of"):
        parse(method, {"GQSA": GQSA, "OQP": OQP})
