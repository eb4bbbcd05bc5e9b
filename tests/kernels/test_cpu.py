"""The products on the CPU against a float64 reference, entry by entry, with outputs poisoned and memory guarded."""

import ctypes
import mmap
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gossamer.core.errors import GossamerError
from gossamer.core.format import DTYPES, Format
from gossamer.core.pattern import NM, Block, Pattern, Unstructured
from gossamer.formats import Bitmask
from gossamer.kernels import _choice, _team
from gossamer.kernels._cases import BATCHES, Case
from tests.kernels.products import DTYPE_IDS, FORMATS, MIDDLING, cases, check, every_kernel, inputs, kernels, matrix, packed

FEW, MANY = 3, 70  # inputs that go through a product of their own, and that go through torch's


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that nobody has written to holds NaN, or an index far out of bounds."""
    empty, new = torch.empty, pytest.MonkeyPatch()

    def poison(*args: Any, **keywords: Any) -> Tensor:
        found = empty(*args, **keywords)
        return found.fill_(float("nan") if found.is_floating_point() else 1 if found.dtype == torch.bool else 127)

    new.setattr(torch, "empty", poison)
    try:
        yield
    finally:
        new.undo()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(**DTYPE_IDS)
@pytest.mark.parametrize(("op", "kernel"), every_kernel())
def test_a_product_is_exact_but_for_sums_in_float32(op: str, kernel: str, dtype: torch.dtype) -> None:
    for case in cases(op):
        weight = packed(op, case, dtype)
        dense = weight.dense()
        for batch in BATCHES:
            x = inputs(batch, case.columns, dtype)
            with poisoned():
                y = weight.linear(x, kernel)
            check(y, x, dense)


@pytest.mark.parametrize(("op", "kernel"), every_kernel())
def test_inputs_and_weights_may_differ_in_dtype(op: str, kernel: str) -> None:
    for dtype in DTYPES:
        weight = packed(op, MIDDLING[op], dtype)
        for other in {*DTYPES, torch.float64} - {dtype}:
            if kernel == "reference" and torch.promote_types(dtype, other) != other:
                continue  # the reference is a product in the dtype of x, and rounds the weight to it
            for batch in (FEW, MANY):
                x = inputs(batch, weight.shape[1], other)
                check(weight.linear(x, kernel), x, weight.dense())


@pytest.mark.parametrize(("op", "kernel"), every_kernel())
def test_inputs_of_any_rank_and_memory_order(op: str, kernel: str) -> None:
    weight = packed(op, MIDDLING[op], torch.float32)
    dense, columns = weight.dense(), weight.shape[1]
    for x in (
        inputs(1, columns, torch.float32)[0],
        inputs(6, columns, torch.float32).view(2, 3, columns),
        inputs(columns, 5, torch.float32).T,
        inputs(5, 2 * columns, torch.float32)[:, ::2],
        inputs(1, columns, torch.float32).expand(30, columns),
        inputs(0, columns, torch.float32).view(2, 0, columns),
    ):
        check(weight.linear(x, kernel), x, dense)


@pytest.mark.parametrize("op", FORMATS)
def test_inputs_of_another_width_are_refused(op: str) -> None:
    weight = packed(op, MIDDLING[op], torch.float32)
    for shape in ((2, weight.shape[1] + 1), (2, weight.shape[1] - 1), (weight.shape[1], 2), ()):
        with pytest.raises(GossamerError, match=rf"takes inputs \(\.\.\., {weight.shape[1]}\)"):
            weight.linear(torch.ones(shape))


@st.composite
def weights(draw: st.DrawFn) -> tuple[type[Format], Tensor, Tensor, Pattern]:
    """A format and a random weight of any density and size that suits it."""
    op, dtype = draw(st.sampled_from(sorted(FORMATS))), draw(st.sampled_from(DTYPES))
    pattern: Pattern = Unstructured()
    h, w = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    sparsity: float | None = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]) | st.floats(0, 1))
    if op == "nm":
        m = draw(st.sampled_from([2, 3, 4, 5, 8, 16, 17, 40]))
        pattern, w, sparsity = NM(draw(st.integers(1, m - 1)), m), w // m * m, None
    if op == "block":
        pattern = Block(draw(st.integers(1, 5)), draw(st.integers(1, 9)))
        h, w = h // pattern.h * pattern.h, w // pattern.w * pattern.w
    return FORMATS[op], *matrix(Case(h, w, repr(pattern), sparsity), dtype, draw(st.integers(0, 1 << 20)))


@settings(max_examples=150, deadline=None)
@given(weights(), st.integers(0, 70), st.sampled_from(["auto", "portable", *(["avx2"] if _choice.has_avx2() else [])]))
def test_any_mask_of_any_density(weight: tuple[type[Format], Tensor, Tensor, Pattern], batch: int, kernel: str) -> None:
    layout, dense, mask, pattern = weight
    kernel = kernel if kernel in layout.kernels else "portable"
    x = inputs(batch, dense.shape[1], dense.dtype)
    with poisoned():
        y = layout.pack(dense, mask, pattern).linear(x, kernel)
    check(y, x, dense)


@pytest.mark.parametrize(("op", "kernel"), every_kernel())
def test_one_thread_and_two_give_the_same_bits(op: str, kernel: str) -> None:
    for dtype in DTYPES:
        weight = packed(op, MIDDLING[op], dtype)
        for batch in (1, FEW, MANY):
            x = inputs(batch, weight.shape[1], dtype)
            with threads(1):
                one = weight.linear(x, kernel)
            with threads(2):
                for _ in range(5):
                    assert torch.equal(weight.linear(x, kernel), one)


def test_without_an_openmp_library_threads_of_python_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_team, "_gomp", lambda: None)
    weight = packed("nm", MIDDLING["nm"], torch.bfloat16)
    x = inputs(FEW, weight.shape[1], torch.bfloat16)
    with threads(2):
        check(weight.linear(x), x, weight.dense())


def test_compiles_without_a_place_to_keep_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(signature: Any, cache: bool = False) -> Callable[[Any], Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: SimpleNamespace(address=(signature, function))

    monkeypatch.setattr(_team, "cfunc", nowhere)
    assert _team.compiled(_team.JOB)(check).address == (_team.JOB, check)


# On the code for processors of 2013 and 2008: the kernels for newer ones would not even compile.
OLD = """
import numpy as np
import torch
from numba import njit
from gossamer.formats import Bitmask
from gossamer.kernels import _choice
from gossamer.kernels._simd import load_float

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    w = (torch.randn(70, 130) * (torch.rand(70, 130) < 0.3)).to(dtype)
    for batch in (1, 5, 40):
        x = torch.randn(batch, 130)
        y = Bitmask.pack(w, w != 0, None).linear(x)
        assert torch.allclose(y, x @ w.float().T, rtol=1e-4, atol=1e-4)

halves = np.arange(1 << 16, dtype=np.uint16)
floats = njit(lambda at: np.array([load_float(at, i, 1) for i in range(1 << 16)], dtype=np.float32))(halves.ctypes.data)
wanted = torch.from_numpy(halves.view(np.float16)).float().numpy()
assert np.array_equal(floats, wanted, equal_nan=True) and (np.signbit(floats) == np.signbit(wanted)).all()
print(_choice.has_avx512(), _choice.has_avx2())
"""


OLDER = "+popcnt,+sse4.2,+sse4.1,+ssse3,+sse3"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are x86-64 processors")
@pytest.mark.parametrize(
    ("name", "features", "said"),
    [
        ("haswell", f"+avx2,+fma,+f16c,+bmi,+bmi2,+avx,{OLDER}", "False True"),
        ("nehalem", OLDER, "False False"),
        ("", "", "False False"),  # this one, told to do without AVX
    ],
)
def test_an_old_processor_never_compiles_what_it_has_not(name: str, features: str, said: str, tmp_path: Path) -> None:
    told = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features} if name else {"NUMBA_ENABLE_AVX": "0"}
    told |= {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OLD], env=os.environ | told, capture_output=True, text=True)
    assert done.stdout == f"{said}\n", done.stderr


@pytest.mark.parametrize("kernel", kernels("bitmask"))
@pytest.mark.parametrize(**DTYPE_IDS)
def test_what_is_not_a_number_stays_in_its_row(kernel: str, dtype: torch.dtype) -> None:
    """Rows that keep nothing of their last columns, before rows that begin with NaN or are endless."""
    dense = torch.randn(12, 33).to(dtype)
    dense[:, 20:] = 0
    dense[1::4, 0], dense[3::4, 0] = torch.nan, torch.inf
    for batch in (1, 2, 8):
        x = inputs(batch, 33, dtype).abs() + 1
        y = Bitmask.pack(dense).linear(x, kernel)
        assert y[:, 0::2].isfinite().all()
        assert y[:, 1::4].isnan().all()
        assert y[:, 3::4].isinf().all()


@pytest.mark.parametrize("kernel", [k for k in kernels("bitmask") if k.values[0] != "portable"])
def test_an_endless_input_is_the_same_to_every_row(kernel: str) -> None:
    """Nothing times infinity is NaN, as in a dense product, wherever in memory a row's values lie."""
    dense = torch.randn(9, 16)
    dense[:, 3] = 0
    x = torch.ones(2, 16)
    x[:, 3] = torch.inf
    assert Bitmask.pack(dense).linear(x, kernel).isnan().all()


@pytest.mark.parametrize("there", [True, False])
def test_many_inputs_in_bfloat16_with_and_without_instructions_for_it(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.kernels._tiles.has_bfloat16", lambda: there)
    for op in FORMATS:
        weight = packed(op, MIDDLING[op], torch.bfloat16)
        x = inputs(MANY, weight.shape[1], torch.bfloat16)
        y = weight.linear(x, "portable")
        assert y.dtype == torch.bfloat16
        check(y, x, weight.dense())


# In a child of a process whose OpenMP team is running, which a child has not got.


def _in_child(work: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    stuck = child.is_alive()
    if stuck:
        child.kill()
        child.join()
    assert not stuck, "the child hangs"
    assert child.exitcode == 0


def _warmed(op: str) -> Format:
    """Return a weight whose product has just run here on two threads."""
    weight = packed(op, MIDDLING[op], torch.bfloat16)
    with threads(2):
        weight.linear(inputs(FEW, weight.shape[1], torch.bfloat16))
    return weight


forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@forks
@pytest.mark.parametrize("op", FORMATS)
def test_works_in_a_forked_child(op: str) -> None:
    weight = _warmed(op)
    x = inputs(FEW, weight.shape[1], torch.bfloat16)
    y = weight.linear(x)

    def work() -> None:  # torch's own products hang here where they use two threads
        torch.set_num_threads(2)
        assert torch.equal(weight.linear(x), y)

    _in_child(work)


class _Products(Dataset[Tensor]):
    def __init__(self, weights: list[Format]) -> None:
        self.weights = weights

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, i: int) -> Tensor:
        return self.weights[i].linear(inputs(MANY, self.weights[i].shape[1], torch.bfloat16))


@forks
def test_works_in_a_dataloader_worker() -> None:
    weights = [_warmed(op) for op in FORMATS]
    loader = DataLoader(_Products(weights), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for weight, y in zip(weights, loader, strict=True):
        check(y, inputs(MANY, weight.shape[1], torch.bfloat16), weight.dense())


_libc = ctypes.CDLL(None, use_errno=True)


def _guarded(tensor: Tensor) -> Tensor:
    """Copy a tensor to where memory ends: right after its last byte, nothing may be read."""
    page = mmap.PAGESIZE
    room = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0) == 0
    if not tensor.numel():
        return tensor.clone()
    there = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - tensor.nbytes)
    return there.copy_(tensor.flatten()).view(tensor.shape)


@forks
@pytest.mark.parametrize(("op", "kernel"), [p for p in every_kernel() if "reference" not in p.values])
def test_nothing_is_read_beyond_the_end(op: str, kernel: str) -> None:
    def work() -> None:
        torch.set_num_threads(1)
        for dtype in DTYPES:
            for case in cases(op):
                weight = packed(op, case, dtype)
                kept_apart = {k: _guarded(t) if isinstance(t, Tensor) else t for k, t in vars(weight).items()}
                for batch in (1, FEW, 4, 8, 9, MANY):
                    x = inputs(batch, case.columns, dtype)
                    y = type(weight)(**kept_apart).linear(_guarded(x), kernel)
                    check(y, x, weight.dense())
                    if batch != MANY:  # torch's product, to which bits it comes depends on where x lies
                        assert torch.equal(y, weight.linear(x, kernel))

    _in_child(work)


@pytest.mark.parametrize("op", FORMATS)
def test_compiles_as_one_graph(op: str) -> None:
    weight = packed(op, MIDDLING[op], torch.float32)
    x = inputs(FEW, weight.shape[1], torch.float32)
    compiled = torch.compile(lambda x: weight.linear(x.unsqueeze(0)) + 1, fullgraph=True, backend="eager")
    check(compiled(x)[0] - 1, x, weight.dense())


@pytest.mark.parametrize("op", FORMATS)
def test_a_kernel_that_cannot_run_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(op, MIDDLING[op], torch.float32)
    x = inputs(1, weight.shape[1], torch.float32)
    with pytest.raises(
        GossamerError, match="unknown kernel 'nonsense'; known: auto, avx512, avx2, portable, triton, reference"
    ):
        weight.linear(x, "nonsense")
    for there, message in ((False, "the package triton, which is not installed"), (True, "runs on a GPU")):
        monkeypatch.setattr(_choice, "has_triton", lambda there=there: there)
        with pytest.raises(GossamerError, match=message):
            weight.linear(x, "triton")
    for simd in ("avx512", "avx2"):
        monkeypatch.setattr(_choice, f"has_{simd}", lambda: False)
        with pytest.raises(
            GossamerError, match=f"{simd}.* this processor has not" if op == "bitmask" else f"has no kernel '{simd}'"
        ):
            weight.linear(x, simd)


@pytest.mark.parametrize(**DTYPE_IDS)
@pytest.mark.parametrize("newest", ["avx2", "portable"])
def test_auto_takes_the_best_there_is(newest: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if newest == "avx2" and not _choice.has_avx2():
        pytest.skip("the processor has no AVX2 with FMA and F16C")
    monkeypatch.setattr(_choice, "has_avx512", lambda: False)
    if newest == "portable":
        monkeypatch.setattr(_choice, "has_avx2", lambda: False)
    for op in FORMATS:
        weight = packed(op, MIDDLING[op], dtype)
        for batch in (FEW, MANY):
            x = inputs(batch, weight.shape[1], dtype)
            y = weight.linear(x)
            check(y, x, weight.dense())
            assert torch.equal(y, weight.linear(x, newest if op == "bitmask" else "portable"))
