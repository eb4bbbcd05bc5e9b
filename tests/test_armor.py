"""ARMOR: its loss against explicit matrices in float64, each step against brute force, and what it refuses."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM
from gossamer.core.stats import Stats
from gossamer.scores import NoWagP
from gossamer.solvers import ARMOR
from gossamer.solvers.armor import _blocks, _fit_core, _fit_left, _fit_right, _swap


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    stats = Stats(columns)
    stats.add(torch.randn(40, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.1))
    return torch.randn(rows, columns, generator=generator), stats


def diagonal(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks.double())


def proxy_loss(w: Tensor, found: Tensor, stats: Stats) -> float:
    """Σ (W̄ − Ŵ̄)²·‖X_j‖², the norms of columns and then rows taken from W."""
    w, found = w.double(), found.double()
    columns = w.square().sum(0).sqrt()
    rows = (w / columns).square().sum(1).sqrt()
    off = (w - found) / columns / rows[:, None]
    return float((off.square() * stats.square_sum.double()).sum())


def state(rows: int = 8, columns: int = 16, d: int = 4, pattern: Any = NM(2, 4), seed: int = 0) -> dict[str, Any]:  # noqa: B008
    """Factors somewhere on their way, and the target they are to make."""
    generator = torch.Generator().manual_seed(seed)
    mask = pattern.select(torch.rand(rows, columns, generator=generator), None)
    core = torch.randn(rows, columns, generator=generator) * mask
    left = torch.eye(d) + 0.3 * torch.randn(rows // d, d, d, generator=generator)
    right = torch.eye(d) + 0.3 * torch.randn(columns // d, d, d, generator=generator)
    target = torch.randn(rows, columns, generator=generator)
    found = {"left": left, "core": _blocks(core, d), "right": right}
    return {**found, "keep": _blocks(mask, d), "target": _blocks(target, d), "pattern": pattern}


def rest(s: dict[str, Any]) -> Tensor:
    return s["target"] - s["left"][:, None] @ s["core"] @ s["right"]


def loss(s: dict[str, Any]) -> float:
    return float(rest(s).double().square().sum())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (16, 8), (8, 8), (24, 40)])
def test_the_loss_is_at_most_nowag_ps_and_is_what_is_reported(rows: int, columns: int, pattern: NM) -> None:
    w, stats = layer(rows, columns)
    before = w.clone()
    mask = pattern.select(NoWagP()(w, stats), None)
    start = last = proxy_loss(w, w * mask, stats)
    for steps in range(6):
        left, core, right = ARMOR(block=8, steps=steps)(w, stats, pattern, None)
        now = proxy_loss(w, diagonal(left) @ core.double() @ diagonal(right), stats)
        assert now <= last * (1 + 1e-5) + 1e-9 * start  # some are made exactly, to float32
        assert now / start == pytest.approx(stats.notes["proxy_loss"], rel=1e-3, abs=1e-9)
        assert (core.view(rows, -1, pattern.m).count_nonzero(-1) <= pattern.n).all()
        last = now
    assert last < 0.8 * start
    assert torch.equal(w, before)


def test_without_steps_it_is_nowag_p() -> None:
    w, stats = layer(16, 24)
    left, core, right = ARMOR(block=8, steps=0)(w, stats, NM(2, 4), None)
    mask = NM(2, 4).select(NoWagP()(w, stats), None)
    assert torch.equal(core != 0, mask)
    assert torch.allclose(diagonal(left) @ core.double() @ diagonal(right), (w * mask).double(), atol=1e-6)


def test_a_weight_that_a_core_and_wrappers_can_make_is_found_again() -> None:
    w, stats = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 9)), layer(8, 8)[1]  # rank 1: one value in a block would do
    left, core, right = ARMOR(block=4, steps=30)(w, stats, NM(2, 4), None)
    assert torch.allclose(diagonal(left) @ core.double() @ diagonal(right), w.double(), rtol=1e-2)
    assert stats.notes["proxy_loss"] < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_each_side_goes_to_its_least_squares_optimum(seed: int) -> None:
    s = state(seed=seed)
    target = s["target"].transpose(1, 2).reshape(8, 16).double()
    core = s["core"].transpose(1, 2).reshape(8, 16).double()
    left, after = _fit_left(rest(s), s["left"], s["core"], s["right"])
    assert torch.allclose(after, rest(s | {"left": left}), atol=1e-4)
    y = core @ diagonal(s["right"])
    for i in range(2):
        part = slice(4 * i, 4 * i + 4)
        wanted = torch.linalg.lstsq(y[part].T, target[part].T).solution.T
        assert torch.allclose(left[i].double(), wanted, atol=1e-3)
    right, after = _fit_right(rest(s), s["left"], s["core"], s["right"])
    assert torch.allclose(after, rest(s | {"right": right}), atol=1e-4)
    z = diagonal(s["left"]) @ core
    for j in range(4):
        part = slice(4 * j, 4 * j + 4)
        assert torch.allclose(right[j].double(), torch.linalg.lstsq(z[:, part], target[:, part]).solution, atol=1e-3)


def test_the_core_goes_to_its_optimum_on_the_mask_and_never_uphill() -> None:
    s = state()
    last = loss(s)
    for steps in range(1, 6):
        core, slope = _fit_core(rest(s), s["left"], s["core"], s["right"], s["keep"], steps)
        assert loss(s | {"core": core}) < last
        last = loss(s | {"core": core})
        assert (core[~s["keep"]] == 0).all()
        wanted = s["left"].mT[:, None] @ rest(s | {"core": core}) @ s["right"].mT
        assert torch.allclose(slope, wanted, atol=1e-4)
    core, _ = _fit_core(rest(s), s["left"], s["core"], s["right"], s["keep"], 40)
    for i, j in itertools.product(range(2), range(4)):  # 8 unknowns each: columns a_r ⊗ b_c of the kept (r, c)
        a, b, keep = s["left"][i].double(), s["right"][j].double(), s["keep"][i, j]
        design = torch.stack([torch.outer(a[:, r], b[c]).flatten() for r, c in keep.nonzero()], 1)
        wanted = torch.linalg.lstsq(design, s["target"][i, j].double().flatten()).solution
        assert torch.allclose(core[i, j][keep].double(), wanted, atol=1e-2)


def brute_force(s: dict[str, Any], i: int, j: int) -> list[tuple[float, int, int, Tensor]]:
    """Return (loss of the block, row, group, values) at the best mask and values of each group, all else as it is."""
    a, b, core, target = (x.double() for x in (s["left"][i], s["right"][j], s["core"][i, j], s["target"][i, j]))
    n, m, found = s["pattern"].n, s["pattern"].m, []
    for row, group in itertools.product(range(len(a)), range(len(b) // m)):
        without = core.clone()
        without[row, group * m : group * m + m] = 0
        aim = (target - a @ without @ b).flatten()
        options = []
        for kept in itertools.combinations(range(m), n):
            design = torch.stack([torch.outer(a[:, row], b[group * m + c]).flatten() for c in kept], 1)
            solved = torch.linalg.lstsq(design, aim[:, None]).solution[:, 0]
            values = torch.zeros(m, dtype=torch.float64)
            values[list(kept)] = solved
            options.append((float((aim - design @ solved).square().sum()), row, group, values))
        found.append(min(options, key=lambda option: option[0]))
    return found


@pytest.mark.parametrize(("pattern", "d"), [(NM(2, 4), 4), (NM(2, 4), 8), (NM(1, 2), 4), (NM(3, 4), 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_groups_take_the_best_of_all_masks_and_only_downhill(pattern: NM, d: int, seed: int) -> None:
    s = state(d=d, pattern=pattern, seed=seed)
    slope = s["left"].mT[:, None] @ rest(s) @ s["right"].mT
    core, keep = _swap(slope, s["left"], s["core"], s["right"], s["keep"], pattern)
    after = rest(s | {"core": core}).double().square().sum((-1, -2))
    before = rest(s).double().square().sum((-1, -2))
    assert (keep.view(-1, pattern.m).sum(-1) == pattern.n).all()
    assert (core[~keep] == 0).all()
    for i, j in itertools.product(range(8 // d), range(16 // d)):
        options = brute_force(s, i, j)
        assert float(after[i, j]) < float(before[i, j])
        changed = (core[i, j] != s["core"][i, j]).view(d, -1, pattern.m).any(-1).nonzero().tolist()
        assert len({row for row, _ in changed}) == len(changed), "one group of a row at most"
        for row, group in changed:
            ours = [option for option in options if option[1] == row]
            best = min(ours, key=lambda option: option[0])
            assert best[2] == group
            values = core[i, j, row, group * pattern.m : (group + 1) * pattern.m].double()
            assert torch.allclose(values, best[3], rtol=1e-3, atol=1e-3)
        if len(changed) == 1:
            assert changed[0][0] == min(options, key=lambda option: option[0])[1]


def test_where_all_rows_at_once_would_go_uphill_the_best_alone_is_taken() -> None:
    """Two rows of the core that do the same work: each alone would make up for all that lacks, both together for twice."""
    a = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    a[0, :, 1] = a[0, :, 0]
    a[0, 1, 1] = 1e-2
    a[0, :, 2:] = a[0, :, :1] + 1e-2 * torch.eye(4)[:, 2:]
    right, pattern = torch.eye(4)[None], NM(2, 4)
    core, keep = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    keep[..., :2] = True
    target = torch.zeros(1, 1, 4, 4)
    target[0, 0, 0, 2] = 1.0
    s = {"left": a, "core": core, "right": right, "keep": keep, "target": target, "pattern": pattern}
    slope = a.mT[:, None] @ rest(s) @ right.mT
    found, _ = _swap(slope, a, core, right, keep, pattern)
    assert int((found != 0).any(-1).sum()) == 1
    assert loss(s | {"core": found}) < 1e-3 < loss(s)


def test_dead_inputs_and_dead_rows_are_no_trouble() -> None:
    w, stats = layer(8, 16)
    w[3], w[:, 5] = 0, 0
    dead = Stats(16)
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    x[:, 2] = 0
    dead.add(x)
    nothing = Stats(16)
    nothing.add(torch.zeros(3, 16))
    for known in (stats, dead, nothing, Stats.unseen(16)):
        left, core, right = ARMOR(block=8)(w, known, NM(2, 4), None)
        found = diagonal(left) @ core.double() @ diagonal(right)
        assert found.isfinite().all()
        assert found[3].abs().max() < 1e-6
        assert (found - w).square().sum() < w.square().sum()
    found = ARMOR(block=8)(torch.zeros(8, 16), stats, NM(2, 4), None)
    assert all((t == t).all() and t.isfinite().all() for t in found)


@pytest.mark.parametrize("more", [{"block": 0}, {"steps": -1}, {"inner": -1}])
def test_what_it_is_told_has_to_make_sense(more: dict[str, int]) -> None:
    with pytest.raises(GossamerError, match="ARMOR wants block >= 1, steps >= 0 and inner >= 0; got"):
        ARMOR(**more)


def test_sizes_that_do_not_divide() -> None:
    w, stats = layer(24, 16)
    with pytest.raises(GossamerError, match=r"ARMOR\(block=16\) wants sizes that its block divides; the weight is 24x16"):
        ARMOR(block=16)(w, stats, NM(2, 4), None)
    with pytest.raises(GossamerError, match=r"ARMOR\(block=4\) wants a block that the groups of 4:8 divide"):
        ARMOR(block=4)(w, stats, NM(4, 8), None)
