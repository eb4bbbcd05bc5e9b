"""The product of tiles on 4-bit grids against float64, entry by entry: s·(q − z) is exact, sums are in float32."""

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES
from gossamer.core.grid import fitted, rounded, tiles, untiled
from gossamer.core.pattern import Block
from gossamer.formats import Grouped
from gossamer.kernels._cases import BATCHES, Case
from gossamer.kernels.grouped import KERNELS
from gossamer.kernels.grouped.cases import TESTED
from gossamer.sites._job import pattern_of
from tests.kernels.products import DTYPE_IDS, check, inputs, matrix
from tests.kernels.test_cpu import _guarded, _in_child, forks, poisoned, threads

ON_CPU = [kernel for kernel in KERNELS if kernel != "triton"]


def made(case: Case, dtype: torch.dtype, empty: bool = False) -> tuple[Grouped, Tensor]:
    """Return a weight, and the matrix of its s·(q − z) in float64, which `dense` rounds to the dtype."""
    dense, _, pattern = matrix(case, torch.float32)
    assert isinstance(pattern, Block)
    h, w = pattern.h, pattern.w
    if empty:
        dense[: len(dense) // h // 3 * h] = 0
        dense[-h:] = 0
    own = tiles(dense, h, w)
    packed = Grouped.pack(untiled(rounded(own, *fitted(own, 4, dtype), 4), h, w).to(dtype), None, pattern)
    codes = torch.cat([packed.values & 15, packed.values >> 4], 1)[:, : h * w].double()
    exact = torch.zeros(case.rows // h, case.columns // w, h * w, dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(case.rows // h), packed.offsets.diff())
    exact[row, packed.columns.long()] = (codes - packed.zero.double()[:, None]) * packed.scale.double()[:, None]
    return packed, untiled(exact, h, w)


@pytest.mark.parametrize(**DTYPE_IDS)
@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("empty", [False, True])
def test_a_product_is_exact_but_for_sums_in_float32(kernel: str, dtype: torch.dtype, empty: bool) -> None:
    for case in TESTED:
        packed, exact = made(case, dtype, empty)
        assert torch.equal(exact.to(dtype), packed.dense())
        for batch in BATCHES:
            x = inputs(batch, case.columns, dtype)
            with poisoned():
                y = packed.linear(x, kernel)
            check(y, x, exact)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_inputs_of_other_dtypes_ranks_and_memory_orders(kernel: str) -> None:
    case = Case(33, 528, "1x16", 0.5)
    for dtype in DTYPES:
        packed, exact = made(case, dtype)
        for other in (*DTYPES, torch.float64):
            for batch in (3, 40):
                x = inputs(batch, 528, other)
                if other == torch.float64:
                    torch.testing.assert_close(packed.linear(x, kernel), x @ exact.T, rtol=1e-5, atol=1e-4)
                else:
                    check(packed.linear(x, kernel), x, exact)
        for x in (
            inputs(1, 528, dtype)[0],
            inputs(528, 5, dtype).T,
            inputs(5, 1056, dtype)[:, ::2],
            inputs(6, 528, dtype).view(2, 3, -1),
        ):
            check(packed.linear(x, kernel), x, exact)
    with pytest.raises(GossamerError, match=r"takes inputs \(\.\.\., 528\)"):
        packed.linear(torch.ones(2, 527))


def test_stretches_end_anywhere_and_sums_do_not_depend_on_threads() -> None:
    for case in (Case(3, 20000, "1x16", 0.3), Case(700, 2048, "1x32", 0.6), Case(12, 65 * 160, "2x5", 0.5)):
        packed, exact = made(case, torch.float32)
        assert len(packed.values) * packed.h * packed.w > 3 * (1 << 13), "several stretches"
        x = inputs(3, case.columns, torch.float32)
        with threads(1):
            y = packed.linear(x)
        with threads(2):
            assert torch.equal(packed.linear(x), y)
        check(y, x, exact)


def test_gradients_of_inputs_and_scales_are_those_of_the_dense_product() -> None:
    case = Case(12, 65, "2x5", 0.5)
    packed, exact = made(case, torch.float32)
    scale, x = packed.scale.clone().requires_grad_(), inputs(3, 65, torch.float32).requires_grad_()
    above = inputs(3, 12, torch.float32, seed=2)
    moved = Grouped(packed.shape, 2, 5, packed.values, scale, packed.zero, packed.columns, packed.offsets)
    by_x, by_scale = torch.autograd.grad(moved.linear(x), (x, scale), above)
    torch.testing.assert_close(by_x.double(), above.double() @ exact, rtol=1e-4, atol=1e-4)
    by_w = tiles(above.double().T @ x.detach().double(), 2, 5)[tiles(exact != 0, 2, 5).any(-1)]
    own = tiles(exact, 2, 5)[tiles(exact != 0, 2, 5).any(-1)] / packed.scale.double()[:, None]  # q − z
    torch.testing.assert_close(by_scale.double(), (by_w * own).sum(1), rtol=1e-4, atol=1e-4)


@forks
def test_nothing_is_read_beyond_the_end() -> None:
    def work() -> None:
        torch.set_num_threads(1)
        for case in TESTED:
            packed, _ = made(case, torch.bfloat16)
            apart = Grouped(packed.shape, packed.h, packed.w, **{k: _guarded(t) for k, t in packed.tensors().items()})
            for batch in (1, 3, 40):
                x = inputs(batch, case.columns, torch.float32)
                assert torch.equal(apart.linear(_guarded(x)), packed.linear(x))

    _in_child(work)


def test_compiles_as_one_graph() -> None:
    packed, exact = made(Case(33, 528, "1x16", 0.5), torch.float32)
    x = inputs(3, 528, torch.float32)
    compiled = torch.compile(lambda x: packed.linear(x.unsqueeze(0)) + 1, fullgraph=True, backend="eager")
    check(compiled(x)[0] - 1, x, exact)


def test_the_pattern_of_every_case_is_of_tiles() -> None:
    assert all(isinstance(pattern_of(case.pattern), Block) for case in TESTED)
