"""Formats: dense is the inverse of pack to the bit, sizes are what they should be, and damage is found."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import formats
from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format
from gossamer.core.pattern import NM, Block, Pattern, Unstructured

BITS = {2: torch.int16, 4: torch.int32}
ANY = (formats.Bitmask, formats.Sliced, formats.Tiled)  # take any mask
PATTERNS = (NM(2, 4), NM(1, 2), NM(5, 16), NM(3, 7), Block(4, 1), Block(2, 8))
SHAPES = ((1, 1), (5, 7), (33, 64), (64, 100), (130, 513), (16, 0), (0, 16), (0, 0), (40, 3000))


def named(x: Any) -> str:
    return x.__name__ if isinstance(x, type) else str(x).removeprefix("torch.")


def of(pattern: Pattern) -> tuple[type[Format], ...]:
    return {NM: (formats.NM,), Block: (formats.Block,)}.get(type(pattern), ANY)


def fixed(packed: Format) -> dict[str, int]:
    """Return what a file says of a weight besides its tensors and its shape."""
    return {"n": packed.n, "m": packed.m} if isinstance(packed, formats.NM) else {}


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two matrices have the same bits."""
    bits = BITS[wanted.itemsize]
    return found.dtype == wanted.dtype and torch.equal(found.view(bits), wanted.contiguous().view(bits))


def comes_back(layout: type[Format], dense: Tensor, mask: Tensor | None, pattern: Pattern | None) -> Format:
    """Assert that a matrix comes back from what is packed, and from what is stored of it."""
    packed = layout.pack(dense, mask, pattern)
    assert packed.shape == tuple(dense.shape)
    plain = (lambda m: m) if mask is not None else (lambda m: m.masked_fill(m == 0, 0))  # without a mask a zero's sign may go
    assert same(plain(packed.dense()), plain(dense))
    again = layout.read(list(packed.shape), packed.tensors(), **fixed(packed))  # type: ignore[arg-type]
    assert again.shape == packed.shape
    assert same(again.dense(), packed.dense())
    for name, tensor in packed.tensors(derived=True).items():
        other = again.tensors(derived=True)[name]
        assert torch.equal(tensor.flatten().view(torch.uint8), other.flatten().view(torch.uint8)), name
        assert tensor.is_contiguous(), name
    assert packed.bytes == sum(t.nbytes for t in vars(packed).values() if isinstance(t, Tensor))
    return packed


def any_bits(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a matrix of random bits: subnormals, infinities and NaNs of every payload among them, and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(BITS[dtype.itemsize])
    dense = bits.view(dtype)
    rare = torch.rand(shape, generator=generator)
    dense[rare < 0.1] = -0.0
    dense[(rare > 0.1) & (rare < 0.2)] = 0.0
    dense[(rare > 0.2) & (rare < 0.3)] = math.ldexp(1, -24 if dtype == torch.float16 else -130)  # subnormal
    return dense


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("layout", ANY, ids=named)
def test_any_bits_under_any_mask_come_back(layout: type[Format], dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        for sparsity in (0.0, 0.5, 0.9, 0.999, 1.0):
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
            dense = any_bits(shape, dtype, seed).masked_fill(~mask, 0)
            comes_back(layout, dense, mask, None)
            comes_back(layout, dense, None, Unstructured())


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_any_bits_under_a_pattern_come_back(pattern: Pattern, dtype: torch.dtype) -> None:
    height, width = (1, pattern.m) if isinstance(pattern, NM) else (pattern.h, pattern.w)  # type: ignore[attr-defined]
    for seed, shape in enumerate([(1, 1), (3, 5), (17, 9), (4, 0), (0, 4), (20, 60)]):
        whole = shape[0] * height, shape[1] * width
        mask = pattern.select(torch.rand(whole, generator=torch.Generator().manual_seed(seed)), 0.5 if height > 1 else None)
        dense = any_bits(whole, dtype, seed).masked_fill(~mask, 0)
        (layout,) = of(pattern)
        comes_back(layout, dense, mask, pattern)
        comes_back(layout, dense, None, pattern)
        comes_back(layout, torch.zeros_like(dense), None, pattern)
        comes_back(layout, torch.zeros_like(dense), mask, pattern)  # every kept entry is zero
        if isinstance(pattern, Block):
            comes_back(layout, any_bits(whole, dtype, seed), None, pattern)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70), st.integers(0, 600), st.floats(0, 1), st.sampled_from(DTYPES), st.sampled_from(ANY), st.integers(0, 9)
)
def test_any_size_and_density_comes_back(h: int, w: int, density: float, dtype: torch.dtype, layout: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(h, w, generator=generator) < density * torch.rand(h, 1, generator=generator)  # rows differ in density
    comes_back(layout, any_bits((h, w), dtype, seed).masked_fill(~mask, 0), mask, None)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 1)], ids=str)
def test_memory_order_and_gradients_do_not_matter(pattern: Pattern) -> None:
    mask = pattern.select(torch.rand(24, 32), 0.5 if pattern.takes_sparsity else None)
    dense = torch.randn(24, 32).masked_fill(~mask, 0)
    wide = torch.zeros(48, 64)
    wide[::2, ::2] = dense
    for layout in of(pattern):
        wanted = comes_back(layout, dense, mask, pattern)
        for other, m in (
            (dense.T.contiguous().T, mask.T.contiguous().T),
            (wide[::2, ::2], mask),
            (torch.nn.Parameter(dense), mask),
        ):
            packed = comes_back(layout, other, m, pattern)
            for name, tensor in packed.tensors().items():
                assert torch.equal(tensor, wanted.tensors()[name])
                assert not tensor.requires_grad


def test_steps_beyond_a_byte_are_bridged() -> None:
    dense = torch.zeros(3, 2000)
    for column in (0, 255, 511, 766, 1022, 1999):  # 255 on, 256 on, 255 on, 256 on, far on
        dense[0, column] = column + 1
    dense[1, 1999] = -1
    packed = comes_back(formats.Sliced, dense, None, None)
    assert packed.counts[:3].tolist() == [6 + 1 + 1 + 3, 1, 0]  # type: ignore[attr-defined]
    assert int(packed.steps.max()) == 255  # type: ignore[attr-defined]


# Sizes.


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.58), (0.7, 0.40), (0.9, 0.22)])
def test_a_bitmask_is_as_small_as_promised(sparsity: float, most: float) -> None:
    mask = Unstructured().select(torch.rand(256, 1024), sparsity)
    packed = formats.Bitmask.pack(torch.randn(256, 1024).bfloat16().masked_fill(~mask, 0), mask)
    dense = 256 * 1024 * 2
    assert packed.bytes == 2 * round(256 * 1024 * (1 - sparsity)) + 256 * 1024 // 8 + 8 * 257
    assert packed.bytes <= most * dense


def test_the_other_formats_are_as_small_as_promised() -> None:
    weight = torch.randn(256, 1024).bfloat16()
    for pattern, exact in (
        (NM(2, 4), 256 * 512 * (2 + 1 / 4)),
        (NM(4, 16), 256 * 256 * (2 + 1 / 2)),
        (NM(1, 2), 256 * 512 * (2 + 1 / 8)),
    ):
        mask = pattern.select(torch.rand(256, 1024))
        assert formats.NM.pack(weight.masked_fill(~mask, 0), mask, pattern).bytes == exact
    mask = Block(4, 2).select(torch.rand(256, 1024), 0.75)
    packed: Format = formats.Block.pack(weight.masked_fill(~mask, 0), mask, Block(4, 2))
    assert packed.bytes == 256 * 1024 // 4 // 8 * (8 * 2 + 4) + 8 * 65
    for apart, step in ((4, 0.5), (64, 1)):  # columns: told by half a byte, and not
        mask = (torch.arange(1024) % apart == 0).expand(256, -1)
        kept = 1024 // apart // 8 * 8 * 256  # whole blocks, 32 rows · 8 entries each
        packed = formats.Sliced.pack(weight.masked_fill(~mask, 0), mask)
        assert packed.bytes == kept * (2 + step) + (kept // 256 // 4 + 8) * 32 * 4 + 9 * 4 + 2 * 256 * 4


# What pack refuses.


def test_what_cannot_be_packed_is_refused() -> None:
    for pattern in (*PATTERNS, Unstructured()):
        for layout in of(pattern):
            for dtype in (torch.float64, torch.int8):
                with pytest.raises(GossamerError, match="supported are bfloat16, float16, float32"):
                    layout.pack(torch.zeros(112, 112, dtype=dtype), None, pattern)
            with pytest.raises(GossamerError, match="the mask must be bool of shape"):
                layout.pack(torch.zeros(112, 112), torch.ones(112, 16, dtype=torch.bool), pattern)
            with pytest.raises(GossamerError, match="outside the mask are not zero"):
                layout.pack(torch.ones(112, 112), torch.zeros(112, 112, dtype=torch.bool), pattern)
            with pytest.raises(GossamerError, match="shape"):
                layout.pack(torch.zeros(112), None, pattern)


def test_a_pattern_has_to_be_given_and_to_fit() -> None:
    for pattern in (None, Unstructured(), NM(2, 4)):
        with pytest.raises(GossamerError, match="such as 4x1, not"):
            formats.Block.pack(torch.zeros(4, 4), None, pattern)
    for pattern in (None, Unstructured(), Block(4, 1)):
        with pytest.raises(GossamerError, match="such as 2:4, not"):
            formats.NM.pack(torch.zeros(4, 4), None, pattern)
    with pytest.raises(GossamerError, match="an input dimension that 4 divides"):
        formats.NM.pack(torch.zeros(4, 6), None, NM(2, 4))
    with pytest.raises(GossamerError, match="rows that 4 divides"):
        formats.Block.pack(torch.zeros(6, 4), None, Block(4, 1))
    with pytest.raises(GossamerError, match="groups of up to 256, not of 512"):
        formats.NM.pack(torch.zeros(4, 512), None, NM(2, 512))
    with pytest.raises(GossamerError, match="keeps 3 of a group of 4, more than 2:4 allows"):
        formats.NM.pack(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), None, NM(2, 4))
    with pytest.raises(GossamerError, match="keeps 4 of a group of 4, more than 2:4 allows"):
        formats.NM.pack(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), NM(2, 4))
    fewer = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    comes_back(formats.NM, fewer, None, NM(2, 4))


# What read refuses: one kind of damage after another.


def _weight(layout: type[Format]) -> Format:
    """Return a packed weight of 6×12 (Sliced: of 40×300, some slices long), some rows empty."""
    pattern: Pattern = {formats.NM: NM(2, 4), formats.Block: Block(2, 3)}.get(layout, Unstructured())
    shape = (40, 300) if layout is formats.Sliced else (6, 12)
    mask = pattern.select(
        torch.rand(shape, generator=torch.Generator().manual_seed(1)), 0.5 if pattern.takes_sparsity else None
    )
    if pattern.takes_sparsity:
        mask[2:4] = False
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(2)).masked_fill(~mask, 0)
    return layout.pack(dense, mask, pattern)


Damage = Callable[[dict[str, Tensor]], Any]
LAYOUTS = (formats.Bitmask, formats.Block, formats.NM, formats.Sliced, formats.Tiled)


def _set(name: str, at: Any, to: Any) -> Damage:
    return lambda tensors: tensors[name].__setitem__(at, to)


DAMAGE: dict[tuple[type[Format], str], tuple[Damage, str]] = {
    (formats.Bitmask, "another population"): (_set("bits", (0, 0), 255), "mask keeps .* entries, but there are"),
    (formats.Bitmask, "a column too far"): (
        lambda t: t["bits"][0].__setitem__(1, t["bits"][0, 1] | 16),
        "columns beyond its 12",
    ),
    (formats.Block, "a column too far"): (_set("columns", -1, 4), "do not rise below 4"),
    (formats.Block, "a negative column"): (_set("columns", 0, -1), "do not rise below 4"),
    (formats.Block, "unsorted columns"): (lambda t: t["columns"].copy_(t["columns"].flip(0)), "do not rise"),
    (formats.Block, "the same column twice"): (lambda t: t["columns"][:2].fill_(1), "do not rise"),
    (formats.Block, "offsets that fall"): (_set("offsets", 1, 100), "offsets do not rise"),
    (formats.Block, "offsets that overflow"): (
        lambda t: t["offsets"][1:3].copy_(torch.tensor([3 << 61, -(3 << 61)])),
        "do not rise",
    ),
    (formats.Block, "a first offset"): (_set("offsets", 0, 1), "offsets do not rise"),
    (formats.Block, "a last offset"): (_set("offsets", -1, 1), "offsets do not rise"),
    (formats.NM, "the same position twice"): (_set("positions", (0, 0), 0b01000101), "increasing ones below 4"),
    (formats.NM, "unsorted positions"): (_set("positions", (0, 0), 0b01000001), "increasing ones below 4"),
    (formats.Sliced, "ends that fall"): (lambda t: t["ends"][1:].fill_(-1), "ends do not rise"),
    (formats.Sliced, "a first end"): (_set("ends", 0, 1), "ends do not rise"),
    (formats.Sliced, "huge ends"): (_set("ends", -1, 2**31 - 1), "values must be"),
    (formats.Sliced, "a negative count"): (_set("counts", 0, -1), "more than its slices hold"),
    (formats.Sliced, "a count too high"): (_set("counts", 0, 10**6), "more than its slices hold"),
    (formats.Sliced, "a count too low"): (_set("counts", 0, 3), "values beyond its counts"),
    (formats.Sliced, "a count of no row"): (_set("counts", -1, 1), "more than its slices hold"),
    (formats.Sliced, "a row twice"): (_set("order", 0, 1), "no permutation of its 40 rows"),
    (formats.Sliced, "a row that is not"): (_set("order", 0, 40), "no permutation of its 40 rows"),
    (formats.Sliced, "a negative row"): (_set("order", 0, -1), "no permutation of its 40 rows"),
    (formats.Sliced, "a filler among the rows"): (lambda t: t["order"].copy_(t["order"].roll(1)), "no permutation"),
    (formats.Sliced, "a step too far"): (_set("steps", slice(None), 255), "columns go beyond its 300"),
    (formats.Sliced, "a base too far"): (_set("bases", 0, 2**31 - 1), "columns go beyond its 300"),
    (formats.Sliced, "a negative base"): (_set("bases", 0, -1), "columns go beyond its 300"),
    (formats.Sliced, "a step of nothing"): (_set("steps", 1, 0), "two entries in one place"),
    (formats.Sliced, "a base before"): (_set("bases", slice(32, 64), 0), "columns fall along a row"),
    (formats.Tiled, "another population"): (_set("bits", (0, 0, 0), 255), "mask has room for"),
    (formats.Tiled, "a column too far"): (_set("bits", (0, 1, 0), 255), "beyond its shape"),
    (formats.Tiled, "a row too far"): (_set("bits", (0, 24, 0), 1), "beyond its shape"),
    (formats.Sliced, "a value beyond"): (_set("values", -1, float("nan")), "values beyond its counts"),
}


@pytest.mark.parametrize(("layout", "kind"), DAMAGE, ids=named)
def test_damage_is_found(layout: type[Format], kind: str) -> None:
    damage, message = DAMAGE[layout, kind]
    packed = _weight(layout)
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    damage(tensors)
    with pytest.raises(GossamerError, match=message):
        layout.read(packed.shape, tensors, **fixed(packed))


def test_ends_that_overflow_are_found() -> None:
    packed = formats.Sliced.pack(torch.zeros(128, 3))
    ends = torch.tensor([0, 1 << 30, -(1 << 31), -(1 << 30), 0], dtype=torch.int32)  # every difference is 2³⁰, modulo 2³²
    with pytest.raises(GossamerError, match="ends do not rise"):
        formats.Sliced.read(packed.shape, packed.tensors() | {"ends": ends})


def _misfits(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "longer", torch.cat([tensor, tensor[-1:]])
    yield "shorter", tensor[:-1]
    yield "empty", tensor[:0]
    yield "of another rank", tensor[None]
    yield "of another dtype", tensor.double()
    if name != "values":
        yield "of a wider dtype", tensor.to(torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_a_tensor_that_is_missing_or_misfits_is_named(layout: type[Format]) -> None:
    packed = _weight(layout)
    whole = packed.tensors()
    for name, tensor in whole.items():
        with pytest.raises(GossamerError, match=f"no tensor '{name}'"):
            layout.read(packed.shape, {k: t for k, t in whole.items() if k != name}, **fixed(packed))
        for _, misfit in _misfits(name, tensor):
            with pytest.raises(GossamerError, match="packed weight's"):
                layout.read(packed.shape, whole | {name: misfit}, **fixed(packed))


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_another_shape_is_refused(layout: type[Format]) -> None:
    packed = _weight(layout)
    h, w = packed.shape
    for shape in ((-h, w), (h, -w), (-1, w), (h, -1), (h,), (h, w, 1), (w, h), (h + 40, w), (h, 1), (0, w), (2**40, w)):
        with pytest.raises(GossamerError):
            layout.read(shape, packed.tensors(), **fixed(packed))  # type: ignore[arg-type]


def test_n_and_m_have_to_be_those_of_the_tensors() -> None:
    packed = _weight(formats.NM)
    for n, m in ((1, 4), (2, 3), (2, 6), (0, 4), (4, 4), (3, 2), (-2, 4), (2, 4096)):
        with pytest.raises(GossamerError):
            formats.NM.read(packed.shape, packed.tensors(), n=n, m=m)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Format, dict[str, Tensor]]:
    """A small packed weight, and its tensors after something has happened to them."""
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
    seed, h, w = draw(st.integers(0, 99)), draw(st.integers(0, 20)) * 2, draw(st.integers(0, 30)) * 12
    pattern: Pattern = {formats.NM: NM(2, 3), formats.Block: Block(2, 4)}.get(layout, Unstructured())
    generator = torch.Generator().manual_seed(seed)
    sparsity = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    mask = pattern.select(torch.rand(h, w, generator=generator), sparsity if pattern.takes_sparsity else None)
    packed = layout.pack(torch.randn(h, w, generator=generator).to(dtype).masked_fill(~mask, 0), mask, pattern)
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    names = sorted(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        tensor = tensors[name]
        what = draw(st.sampled_from(["bytes", "bytes", "bytes", "extreme", "cut", "swap", "view", "roll"]))
        if what == "cut":
            tensors[name] = tensor[: draw(st.integers(0, len(tensor)))].clone()
        elif what == "swap":
            other = draw(st.sampled_from(names))
            tensors[name], tensors[other] = tensors[other], tensor
        elif what == "view" and tensor.itemsize == 2:
            tensors[name] = tensor.view(torch.float16 if tensor.dtype == torch.bfloat16 else torch.bfloat16)
        elif what == "roll":
            tensors[name] = tensor.roll(1, -1)
        elif what == "extreme" and tensor.numel() and not tensor.is_floating_point():
            info = torch.iinfo(tensor.dtype)
            at = draw(st.integers(0, tensor.numel() - 1))
            tensor.view(-1)[at] = draw(st.sampled_from([info.min, info.max, 0, 1, info.min // 2, info.max // 2 + 1]))
        elif tensor.numel():
            raw = tensor.view(-1).view(torch.uint8)
            raw[draw(st.integers(0, len(raw) - 1))] ^= draw(st.integers(1, 255))
    return packed, tensors


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_damage_is_refused_or_harmless(weight: tuple[Format, dict[str, Tensor]]) -> None:
    packed, tensors = weight
    try:
        found = type(packed).read(packed.shape, tensors, **fixed(packed))
    except GossamerError:
        return
    dense = found.dense()
    assert dense.shape == packed.shape
    assert dense.dtype == found.values.dtype
    w = dense.double()
    fine = (w.abs() < 1e30).all(1)  # a row with a NaN or an infinity has a sum of its own
    x = torch.randn(3, packed.shape[1], generator=torch.Generator().manual_seed(0))
    size = x.double().abs() @ w[fine].abs().T
    for kernel in ("auto", "portable", "reference") if found.values.dtype == torch.float32 else ("auto", "portable"):
        y = found.linear(x, kernel)
        assert ((y.double()[:, fine] - x.double() @ w[fine].T).abs() <= 1e-4 * size + 1e-30).all()
