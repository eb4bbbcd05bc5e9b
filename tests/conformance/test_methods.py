"""Every score and solver under every pattern that fits, on every way a weight is stored: generated from the package's names."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.core.grid import kept_tiles
from gossamer.core.mlp import SolvesMLP
from gossamer.core.pattern import Block, Pattern
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Solver
from gossamer.core.spec import parse
from gossamer.core.stats import Stats
from gossamer.scores import Magnitude
from gossamer.sites._job import ALLOCATIONS, METHODS, PATTERNS, WHOLE, Job
from gossamer.sites._walk import targets
from tests.sites.families import causal, ids

# Pattern class → specs of it with the sparsity to ask for. A pattern without an example fails below.
EXAMPLES: dict[str, list[tuple[str, float | None]]] = {
    "Unstructured": [("Unstructured", 0.37), ("Unstructured(per='tensor')", 0.5), ("Unstructured(per='row')", 0.6)],
    "NM": [("2:4", None), ("NM(2, 4, permute=True)", None), ("1:4", None), ("5:8", None)],
    "Block": [("4x1", 0.5), ("1x16", 0.5), ("Block(h=2, w=8, pool='max')", 0.3)],
    "Channel": [("Channel(dim=0)", 0.25), ("Channel(dim=1, pool='l2')", 0.5)],
    "TopK": [("TopK(k=3)", None)],
    "Threshold": [("Threshold(tau=0.01)", None)],
}
STORED = {"2-D weight": "llama", "Conv1D, transposed": "gpt2", "stacked experts": "mixtral"}
ONE_BLOCK = {"llama": "num_hidden_layers", "gpt2": "n_layer", "mixtral": "num_hidden_layers"}
SCORES = {name: cls for name, cls in METHODS.items() if issubclass(cls, Score)}
SOLVERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Solver)}
FACTORIZERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Factorizer)}


def made(cls: type) -> Any:
    """Return an instance with its defaults; a method that wraps a score wraps the plainest."""
    if issubclass(cls, Factorizer):
        return cls(block=8)
    try:
        return cls()
    except TypeError:
        return cls(Magnitude())


def cases() -> Iterator[Any]:
    for name, cls in METHODS.items():
        method = made(cls)
        if isinstance(method, Factorizer):  # no masked weight: see below
            continue
        for pattern_name, specs in EXAMPLES.items():
            fits = isinstance(method, Score) or issubclass(PATTERNS[pattern_name], method.patterns)
            for spec, sparsity in specs if fits else ():
                if "permute" in spec and method.needs & WHOLE:
                    continue  # refused: it wants the inputs
                for stored, family in STORED.items():
                    if isinstance(method, SolvesMLP) and family == "mixtral":
                        continue  # refused: it wants one MLP in each block
                    yield pytest.param(method, spec, sparsity, family, id=f"{name}-{spec}-{stored}")


def expected(pattern: Pattern, shape: tuple[int, ...], sparsity: float | None) -> int | None:
    """Return how many entries of one matrix stay; None where the scores decide."""
    rows, columns = shape
    name = type(pattern).__name__
    if name == "Threshold":
        return None
    if sparsity is None:
        return rows * (pattern.k if name == "TopK" else columns * pattern.n // pattern.m)  # type: ignore[attr-defined]
    unit, times = 1, 1
    if name == "Block":
        unit = pattern.h * pattern.w  # type: ignore[attr-defined]
    elif name == "Channel":
        unit = shape[1 - pattern.dim]  # type: ignore[attr-defined]
    elif getattr(pattern, "per", None) == "row":
        times = rows
    return round((1 - sparsity) * (rows * columns // unit // times)) * unit * times


def test_every_pattern_has_an_example() -> None:
    assert EXAMPLES.keys() == PATTERNS.keys()
    for name, specs in EXAMPLES.items():
        for spec, _ in specs:
            assert type(parse(spec, PATTERNS, "pattern")) is PATTERNS[name]


@pytest.mark.parametrize(("method", "spec", "sparsity", "family"), list(cases()))
def test_through_the_verb(method: Any, spec: str, sparsity: float | None, family: str) -> None:
    runs = []
    for _ in range(2):
        model = causal(family, **{ONE_BLOCK[family]: 1})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report = gossamer.prune(model, method, spec, sparsity=sparsity, data=ids(2, 24))
        runs.append(model.state_dict())
    names = {row["name"] for row in report.weights}
    pattern = Job.of(method, spec, sparsity).pattern
    for name, now in runs[0].items():
        assert now.isfinite().all(), name
        assert torch.equal(now, runs[1][name]), f"{name} is not the same the second time"
        assert name in names or torch.equal(now, before[name]), f"{name} is no target and has changed"
    for target in targets(model):
        for matrix in target.matrices():
            count = expected(pattern, tuple(matrix.shape), sparsity)
            if count is not None:
                # Of tiles, those that hold anything: a method that rounds makes some kept entries 0.
                kept = kept_tiles(matrix, pattern.h, pattern.w) if isinstance(pattern, Block) else matrix
                assert int(kept.count_nonzero()) == count, target.name
            if type(pattern).__name__ == "NM":
                groups = matrix.reshape(-1, pattern.m).count_nonzero(1)  # type: ignore[attr-defined]
                assert (groups == pattern.n).all(), "along the input dimension, however it is stored"  # type: ignore[attr-defined]
    assert type(pattern).__name__ == "Threshold" or 0 < report.totals["sparsity"] < 1


@pytest.mark.parametrize("spec", [spec for specs in EXAMPLES.values() for spec, _ in specs])
def test_patterns_read_back_what_they_write_and_give_bool_masks(spec: str) -> None:
    pattern = parse(spec, PATTERNS, "pattern")
    assert parse(repr(pattern), PATTERNS, "pattern") == pattern
    sparsity = 0.5 if pattern.takes_sparsity else None
    for scores in (torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).abs(), torch.ones(8, 16)):
        mask = pattern.select(scores, sparsity)
        assert mask.dtype is torch.bool
        assert mask.shape == scores.shape
        count = expected(pattern, (8, 16), sparsity)
        assert count is None or int(mask.sum()) == count
        assert torch.equal(mask, pattern.select(scores, sparsity))


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(rows)
    stats = Stats(columns, gram=True, mean=True)
    x, drift = torch.randn(2, 3 * columns, columns, generator=generator)
    stats.add(x, dense=x + 0.1 * drift)
    stats.grads = torch.randn(4, rows, columns, generator=generator)
    stats.grad = stats.grads.mean(0)
    stats.square_grad = torch.rand(rows, columns, generator=generator)
    stats.hessian_grad = torch.randn(rows, columns, generator=generator)
    stats.synflow = torch.rand(rows, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator).to(dtype), stats


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 16), (1, 16), (16, 1), (5, 7)])
def test_a_score_has_the_weights_shape_and_is_finite_float32(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    score = made(SCORES[name])
    w, stats = layer(*shape, dtype)
    before = w.clone()
    found = score(w, stats)
    assert found.shape == w.shape
    assert found.dtype is torch.float32
    assert found.isfinite().all()
    assert torch.equal(found, score(w, stats))
    assert torch.equal(w, before)
    strided = w.T.contiguous().T
    assert torch.allclose(score(strided, stats), found), "however it is stored"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_back_what_it_writes(name: str) -> None:
    method = made(METHODS[name])
    assert parse(repr(method), METHODS, "method") == method
    assert hash(method) == hash(made(METHODS[name]))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_solver_gives_weights_and_their_bool_mask(name: str, dtype: torch.dtype) -> None:
    solver = made(SOLVERS[name])
    for pattern_name, specs in EXAMPLES.items():
        if not issubclass(PATTERNS[pattern_name], solver.patterns):
            continue
        for spec, sparsity in specs:
            pattern = parse(spec, PATTERNS, "pattern")
            w, stats = layer(8, 16, dtype)
            before = w.clone()
            found, mask = solver(w, stats, pattern, sparsity)
            assert mask.dtype is torch.bool
            assert found.dtype is dtype
            assert found.shape == mask.shape == w.shape
            assert found.isfinite().all()
            assert (found[~mask] == 0).all()
            count = expected(pattern, (8, 16), sparsity)
            assert count is None or int(mask.sum()) == count
            assert torch.equal(w, before)


@pytest.mark.parametrize("name", FACTORIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [spec for spec, _ in EXAMPLES["NM"]])
def test_a_factorizer_gives_a_core_under_the_pattern_and_blocks(name: str, dtype: torch.dtype, spec: str) -> None:
    factorizer, pattern = made(FACTORIZERS[name]), parse(spec, PATTERNS, "pattern")
    w, stats = layer(16, 24, dtype)
    before = w.clone()
    found = factorizer(w, stats, pattern, None)
    assert found.core.shape == w.shape
    assert (found.core.view(16, -1, pattern.m).count_nonzero(-1) == pattern.n).all()
    for blocks, size in zip((found.left, found.right), w.shape, strict=True):
        assert blocks.shape[0] * blocks.shape[1] == size
        assert blocks.shape[1] == blocks.shape[2]
    for tensor, again in zip(found, factorizer(w, stats, pattern, None), strict=True):
        assert tensor.dtype is torch.float32
        assert tensor.isfinite().all()
        assert torch.equal(tensor, again)
    assert torch.equal(w, before)


@pytest.mark.parametrize("name", FACTORIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_factorizer_through_the_verb(name: str, family: str) -> None:
    runs = []
    for _ in range(2):
        model = causal(family, **{ONE_BLOCK[family]: 1})
        before = {target.name: target.matrices()[0].clone() for target in targets(model)}
        others = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in before}
        report = gossamer.prune(model, made(FACTORIZERS[name]), "2:4", data=ids(2, 24))
        runs.append(model.state_dict())
        assert report.totals["sparsity"] == 0.5
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in others.items())
        for row in report.weights:
            layer = model.get_submodule(row["name"].removesuffix(".weight"))
            assert layer.packed.bytes == row["bytes"]
            assert int(layer.packed.core.dense().count_nonzero()) == row["nnz"] == math.prod(row["shape"]) // 2
            dense, was = layer.packed.dense(), before[row["name"]]
            assert dense.shape == was.shape
            assert dense.count_nonzero() == dense.numel()
            assert (dense - was).square().sum() < 0.5 * was.square().sum()
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(tensor, runs[1][key]) for key, tensor in runs[0].items())


def without_arguments() -> list[str]:
    found = []
    for name in ALLOCATIONS:
        try:
            parse(name, ALLOCATIONS, "allocation")
            found.append(name)
        except gossamer.GossamerError:  # it wants to be told something
            continue
    return found


@pytest.mark.parametrize("name", without_arguments())
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("family", STORED.values())
def test_an_allocation_reaches_the_total(name: str, sparsity: float, family: str) -> None:
    model = causal(family)
    pattern = "Unstructured(per='tensor')"
    report = gossamer.prune(model, "Magnitude", pattern, sparsity=sparsity, allocate=name, data=ids(seqlen=24))
    matrices = sum(len(target.matrices()) for target in targets(model))  # each expert's matrix is a tensor of its own
    entries = sum(math.prod(row["shape"]) for row in report.weights)
    assert abs(report.totals["nnz"] - (1 - sparsity) * entries) <= matrices
