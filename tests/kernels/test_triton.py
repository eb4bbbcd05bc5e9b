"""The products on a GPU against a float64 reference, entry by entry, with memory that nobody has written poisoned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import formats
from gossamer.core.format import DTYPES, Format
from gossamer.core.pattern import NM, Block, Pattern
from gossamer.kernels._cases import Case
from gossamer.kernels._choice import has_triton
from gossamer.sites._sparse_linear import SparseLinear
from tests.kernels.products import DTYPE_IDS, FORMATS, MIDDLING, cases, check, inputs, matrix, packed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed"),
]

GPU = torch.device("cuda")
BATCHES = (1, 2, 3, 5, 16, 17, 64, 100)

# Sizes on, before and after those of a window and of a program, and larger than one program of each kind.
TILES = ((96, 128, "4x1"), (40, 64, "1x8"), (64, 96, "16x16"), (96, 128, "32x32"), (60, 84, "5x7"))
OF_GROUPS = (
    (64, 128, "2:4"),
    (65, 144, "2:4"),
    (3, 20, "2:4"),
    (130, 4112, "2:4"),
    (33, 96, "1:2"),
    (33, 70, "3:7"),
    (5, 600, "9:200"),
)
MORE: dict[str, tuple[Case, ...]] = {
    "bitmask": (Case(64, 64), Case(65, 128), Case(63, 576, sparsity=0.9), Case(700, 1031, sparsity=0.7)),
    "block": (
        *(Case(*tiles, sparsity) for tiles in TILES for sparsity in (0.0, 0.5, 0.95)),
        Case(256, 512, "128x256"),
        Case(600, 2048, "2x4", 0.7),
    ),
    "nm": tuple(Case(*groups, None) for groups in OF_GROUPS),
    "tiled": (Case(64, 512), Case(65, 520, sparsity=0.9), Case(300, 2100, sparsity=0.7), Case(16, 1024, sparsity=0.0)),
    "sliced": (Case(64, 128), Case(65, 129, sparsity=0.9), Case(300, 2100, sparsity=0.7), Case(40, 9000, sparsity=0.99)),
}
LARGE = {
    "bitmask": Case(1024, 1536),
    "block": Case(1024, 1536, "16x16"),
    "nm": Case(1024, 1536, "2:4", None),
    "sliced": Case(1024, 1536),
    "tiled": Case(1024, 1536),
}


@pytest.fixture(autouse=True)
def _exact_dense_products() -> Iterator[None]:
    """Torch's own products, which many inputs go through, add up in float32 and not in the inputs' dtype."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, whatever `torch.empty` returns holds NaN."""
    empty, new = torch.empty, pytest.MonkeyPatch()
    new.setattr(torch, "empty", lambda *size, **keywords: empty(*size, **keywords).fill_(float("nan")))
    try:
        yield
    finally:
        new.undo()


def there(weight: Format) -> Format:
    """Move a packed weight to the GPU."""
    return type(weight)(**{k: v.to(GPU) if isinstance(v, Tensor) else v for k, v in vars(weight).items()})


@pytest.mark.parametrize(**DTYPE_IDS)
@pytest.mark.parametrize("op", FORMATS)
def test_a_product_is_exact_but_for_sums_in_float32(op: str, dtype: torch.dtype) -> None:
    for case in (*cases(op), *MORE[op], LARGE[op]):
        weight = there(packed(op, case, dtype))
        dense = weight.dense()
        for batch in (0, *BATCHES):
            x = inputs(batch, case.columns, dtype).to(GPU)
            with poisoned():
                y = weight.linear(x, "triton")
            check(y, x, dense)


@pytest.mark.parametrize(**DTYPE_IDS)
def test_rows_of_a_slice_may_have_nothing_in_common(dtype: torch.dtype) -> None:
    row, column = torch.arange(160)[:, None], torch.arange(1500)[None, :]
    masks = {
        "triangle": column < row * 9,
        "apart": torch.where(row % 2 == 0, column < 70, column >= 1400),
        "one": (row == 77) & (column >= 0),
        "last": (column == 1499) & (row >= 0),
        "far": (column % 700 == 699) & (row % 3 == 0),
        "uneven": torch.rand(160, 1500, generator=torch.Generator().manual_seed(0)) < (row % 32 + 1) / 33,
    }
    for mask in masks.values():
        dense = torch.randn(160, 1500, generator=torch.Generator().manual_seed(1)).to(dtype).masked_fill(~mask, 0)
        for layout in (formats.Sliced, formats.Tiled):
            weight = there(layout.pack(dense, mask))
            for batch in BATCHES:
                x = inputs(batch, 1500, dtype).to(GPU)
                with poisoned():
                    y = weight.linear(x, "triton")
                check(y, x, dense.to(GPU))


@pytest.mark.parametrize("op", FORMATS)
def test_many_inputs_find_the_weight_to_the_bit(op: str) -> None:
    """More inputs go by way of the dense weight: with the unit matrix for them, it is seen."""
    for dtype in DTYPES:
        for case in (*MORE[op], LARGE[op]):
            if case.columns > 64:
                weight = there(packed(op, case, dtype))
                with poisoned():
                    y = weight.linear(torch.eye(case.columns, dtype=dtype, device=GPU), "triton")
                assert torch.equal(y.T, weight.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tiled_product_with_the_inputs_of_a_prompt(dtype: torch.dtype) -> None:
    """A Hopper GPU has a kernel for them, of tiles of 256 inputs and 128 rows, with sums in parts where there are few tiles."""
    for case in (*cases("tiled"), *MORE["tiled"], LARGE["tiled"], Case(129, 4352, sparsity=0.0), Case(1000, 700, sparsity=0.9)):
        weight = there(packed("tiled", case, dtype))
        for batch in (65, 255, 256, 300, 512):
            x = inputs(batch, case.columns, dtype).to(GPU)
            with poisoned():
                y = weight.linear(x, "triton")
            check(y, x, weight.dense())
            assert torch.equal(y, weight.linear(x, "triton"))


@pytest.mark.parametrize("op", FORMATS)
def test_inputs_and_weights_may_differ_in_dtype(op: str) -> None:
    for dtype in DTYPES:
        weight = there(packed(op, MIDDLING[op], dtype))
        for other in {*DTYPES, torch.float64} - {dtype}:
            for batch in (1, 3, 16, 100):
                x = inputs(batch, weight.shape[1], other).to(GPU)
                check(weight.linear(x, "triton"), x, weight.dense())


@pytest.mark.parametrize("op", FORMATS)
def test_inputs_of_any_rank_memory_order_and_alignment(op: str) -> None:
    for dtype in DTYPES:
        weight = there(packed(op, MIDDLING[op], dtype))
        columns = weight.shape[1]
        wide = inputs(2 * 7, 2 * columns + 1, dtype).to(GPU)
        for x in (wide[0, 1 : columns + 1], wide[::2, 1::2], wide[:, :columns].T.contiguous().T, wide[None, :3, :columns]):
            check(weight.linear(x, "triton"), x, weight.dense())


@pytest.mark.parametrize("op", FORMATS)
def test_the_same_comes_out_every_time(op: str) -> None:
    weight = there(packed(op, LARGE[op], torch.bfloat16))
    for batch in BATCHES:
        x = inputs(batch, weight.shape[1], torch.bfloat16).to(GPU)
        first = weight.linear(x, "triton")
        assert all(torch.equal(first, weight.linear(x, "triton")) for _ in range(5))


@pytest.mark.parametrize("op", FORMATS)
def test_a_product_can_be_captured_in_a_graph(op: str) -> None:
    for dtype in DTYPES:
        weight = there(packed(op, LARGE[op], dtype))
        for batch in (1, 3, 16, 100):
            x = inputs(batch, weight.shape[1], dtype).to(GPU)
            weight.linear(x, "triton")  # what is compiled is compiled now
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = weight.linear(x, "triton")
            for seed in (5, 6):
                x.copy_(inputs(batch, weight.shape[1], dtype, seed))
                y.fill_(float("nan"))
                graph.replay()
                assert torch.equal(y, weight.linear(x, "triton"))


def layer(layout: Any, pattern: Pattern | None, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    dense, mask, _ = matrix(Case(192, 256, str(pattern or "Unstructured"), None if isinstance(pattern, NM) else 0.5), dtype)
    weight = layout.pack(dense.to(GPU), mask.to(GPU), pattern)
    bias = nn.Parameter(torch.randn(192, dtype=dtype, device=GPU), requires_grad=False)
    return nn.Sequential(SparseLinear(weight, bias), nn.GELU()), dense.to(GPU)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler, on newer Pythons
@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        (formats.Bitmask, None),
        (formats.Sliced, None),
        (formats.Tiled, None),
        (formats.NM, NM(2, 4)),
        (formats.Block, Block(4, 1)),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_a_module_compiles_without_a_break(layout: type[Format], pattern: Pattern | None) -> None:
    torch.compiler.reset()  # it counts recompilations of one Sequential for all of them together
    module, dense = layer(layout, pattern, torch.bfloat16)
    compiled: Callable[[Tensor], Tensor] = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        for batch in (1, 16):
            x = inputs(batch, 256, torch.bfloat16).to(GPU)
            wanted = torch.nn.functional.gelu(x.double() @ dense.double().T + module[0].bias.double())  # type: ignore[index]
            close = {"rtol": 2**-6, "atol": 2**-6}
            torch.testing.assert_close(module(x).double(), wanted, **close)
            torch.testing.assert_close(compiled(x).double(), wanted, **close)


@pytest.mark.parametrize("layout", [formats.Bitmask, formats.Sliced, formats.Tiled], ids=lambda x: x.__name__)
def test_a_weight_of_more_than_two_thousand_million_entries(layout: type[Format]) -> None:
    rows, columns = 66000, 33024
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("there is too little memory")
    dense = torch.zeros(rows, columns, dtype=torch.bfloat16, device=GPU)
    dense[-500:] = torch.randn(500, columns, device=GPU).bfloat16() * (torch.rand(500, columns, device=GPU) < 0.3)
    dense[:, -3] = 1
    weight = layout.pack(dense)
    for batch in (1, 16, 100):
        x = torch.randn(batch, columns, device=GPU).bfloat16()
        y = weight.linear(x, "triton")
        check(y[:, -600:], x, dense[-600:])
        assert torch.equal(y[:, :-500], x[:, -3:-2].expand(-1, rows - 500))
