"""ECoFLaP's probes against gradients; SAP's index and bound by hand; a fixed minimum of entries; another score."""

import math

import pytest
import torch

from gossamer.core.allocate import by, ecoflap, erk, global_, owl, sap
from gossamer.core.allocate._index import bound, pq_index
from gossamer.core.allocate._probed import probe, shared
from gossamer.core.errors import GossamerError
from gossamer.core.spec import parse
from gossamer.scores import Wanda
from gossamer.sites._job import ALLOCATIONS


def test_a_probe_is_the_finite_difference_along_its_own_z() -> None:
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = w.clone()
    gradient = 2 * w * torch.arange(12, dtype=torch.float64).view(3, 4)  # of Σ j w_j²
    found = probe([w], [lambda: float((torch.arange(12).view(3, 4) * w.square()).sum())] * 3, 1e-4, seed=5)
    generator = torch.Generator().manual_seed(5)
    along = [float((gradient * torch.randn(3, 4, generator=generator)).sum()) for _ in range(3)]
    assert found == pytest.approx(sum(map(abs, along)) / 3, rel=1e-6)
    assert torch.equal(w, before)


def test_a_probe_puts_the_weight_back_when_the_loss_fails() -> None:
    w = torch.randn(5).to(torch.bfloat16)
    before = w.clone()
    with pytest.raises(ZeroDivisionError):
        probe([w], [lambda: 1 / 0], 1e-3, seed=0)
    assert torch.equal(w, before)


def test_a_block_is_moved_as_one_and_its_weights_share_its_sparsity() -> None:
    w = {f"layers.{i}.{kind}": torch.zeros(4, 4, dtype=torch.float64) for i in range(2) for kind in ("a", "b")}
    slopes = dict(zip(w, (3.0, -4.0, 0.5, 0.5), strict=True))
    losses = [lambda: sum(slope * float(w[name].sum()) for name, slope in slopes.items())] * 3
    calls: list[int] = []
    found = ecoflap(w, 0.5, [lambda loss=loss: calls.append(1) or loss() for loss in losses])
    assert len(calls) == 2 * 3 * 2, "two passes for each window and block"
    assert found["layers.0.a"] == found["layers.0.b"] < 0.5 < found["layers.1.a"] == found["layers.1.b"]
    worth = []
    for seed, block in enumerate(([3.0, -4.0], [0.5, 0.5])):
        generator = torch.Generator().manual_seed(seed)
        along = [sum(s * float(torch.randn(4, 4, generator=generator).sum()) for s in block) for _ in range(3)]
        worth.append(sum(map(abs, along)) / 3)
    expected = shared(dict(zip("ab", worth, strict=True)), {"a": 32, "b": 32}, 0.5, 0.6)
    assert [found["layers.0.a"], found["layers.1.a"]] == pytest.approx(list(expected.values()), rel=1e-6)


def test_entries_are_shared_by_importance_above_the_floor() -> None:
    # 30 of 60 stay; a sparsity of 0.6 at most keeps 8 of each 20, and the other 6 go 4 : 2 : 0
    found = shared({"a": 2.0, "b": 1.0, "c": 0.0}, dict.fromkeys("abc", 20), 0.5, 0.6)
    assert found == pytest.approx({"a": 1 - 12 / 20, "b": 1 - 10 / 20, "c": 0.6})
    # 54 of 60 stay: 24 is the floor, a's 30 are more than its 12 left; then 18 are left for b's 12 and c, to which 6 go
    full = shared({"a": 100.0, "b": 10.0, "c": 1.0}, dict.fromkeys("abc", 20), 0.1, 0.6)
    assert full == pytest.approx({"a": 0.0, "b": 0.0, "c": 1 - 14 / 20})
    assert shared({"a": 0.0, "b": 0.0}, {"a": 10, "b": 30}, 0.5, 0.9) == pytest.approx({"a": 0.5, "b": 0.5})


def test_ecoflap_wants_windows_and_sound_numbers() -> None:
    w = {"a": torch.ones(4), "b": torch.ones(4)}
    with pytest.raises(GossamerError, match="there is none"):
        ecoflap(w, 0.5, [])
    with pytest.raises(GossamerError, match="a: the loss beside it"):
        ecoflap(w, 0.5, [lambda: math.nan])
    for wrong in ({"eps": 0}, {"margin": -0.1}, {"samples": 0}):
        with pytest.raises(GossamerError, match="ecoflap wants"):
            ecoflap(w, 0.5, [lambda: 0.0], **wrong)


def test_the_pq_index_by_hand() -> None:
    # w = (4, 1): ‖w‖_½ = (2 + 1)² = 9, ‖w‖_1 = 5, d^(1 − 2) = 1/2: I = 1 − 9/10
    assert pq_index(torch.tensor([4.0, -1.0])) == pytest.approx(0.1)
    assert pq_index(torch.tensor([4.0, -1.0, 0.0]) * 1e-30) == pytest.approx(0.1), "whatever the scale, of what is left"
    # p = 1, q = 2: ‖w‖_1/‖w‖_2 = 5/√17, d^(1/2 − 1) = 1/√2
    assert pq_index(torch.tensor([4.0, 1.0]), 1, 2) == pytest.approx(1 - 5 / math.sqrt(34))
    # r/d = (1 + η)^(−q/(q−p)) (1 − I)^(pq/(q−p)): exponents 2 and 1 for ½ and 1
    assert bound(0.1, eta=1.0) == pytest.approx(0.9 / 4)
    assert bound(0.1, 1, 2, 0.0) == pytest.approx(0.9**2)


def test_the_bound_holds_for_what_it_promises() -> None:
    """Keeping r entries and no fewer is needed for ‖w‖_p of what stays to be (1 + η)-near: with η = 0 all of equal entries."""
    w = torch.cat([torch.ones(25), torch.zeros(75)])
    assert bound(pq_index(w)) == pytest.approx(1.0)
    assert sap({"w": w}) == {"w": 0.75}, "of the 25 that are left none is spare"


def needed(w: torch.Tensor, p: float, q: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return every r = 1 … d, its least η_r, Σ_rest |w|^p = η_r·Σ_largest |w|^p, and the r that the theorem wants at it."""
    powers = w.double().abs().sort(descending=True).values.pow(p)
    kept = powers.cumsum(0)
    etas = powers.flip(0).cumsum(0).flip(0)[1:] / kept[:-1]
    etas = torch.cat([etas, etas.new_zeros(1)])  # nothing is dropped at r = d
    index = pq_index(w.double(), p, q)
    return torch.arange(1, len(w) + 1), etas, torch.tensor([len(w) * bound(index, p, q, float(eta)) for eta in etas])


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.25, 0.75), (0.5, 3.0)])
@pytest.mark.parametrize("d", [1, 2, 7, 100])
def test_no_vector_gets_by_with_fewer_entries_than_the_theorem_wants(d: int, p: float, q: float) -> None:
    generator = torch.Generator().manual_seed(d)
    for power in (0.0, 0.5, 1.0, 3.0, 8.0):  # from equal entries to a few that hold everything
        for _ in range(5):
            w = torch.randn(d, generator=generator).double()
            r, _, least = needed(w.sign() * w.abs() ** power, p, q)
            assert (r >= least * (1 - 1e-9)).all(), (power, w)


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 3.0), (0.25, 0.75), (0.5, 3.0)])
@pytest.mark.parametrize(("r", "eta"), [(3, 0.0), (30, 0.1), (5, 1.0), (1, 4.0)])
def test_some_vectors_need_no_more_than_the_theorem_wants(r: int, eta: float, p: float, q: float) -> None:
    """Hölder's inequality is an equality for r equal entries; the others share out η in p-norm, and have next to no q-norm.

    So no exponent may be another: a larger bound would be wrong here, and a smaller one not the theorem's.
    """
    d = 300_000
    w = torch.full((d,), (eta * r / (d - r) + 1e-12) ** (1 / p), dtype=torch.float64)
    w[:r] = 1.0
    reached = float(w[r:].pow(p).sum() / r)
    assert reached == pytest.approx(eta, abs=1e-6)
    assert d * bound(pq_index(w, p, q), p, q, reached) == pytest.approx(r, rel=5e-3)


def test_sap_without_a_sparsity_is_the_papers_and_goes_on_from_zeros() -> None:
    w = torch.tensor([4.0, 1.0]).repeat(50)
    assert sap({"w": w})["w"] == pytest.approx(0.1)
    assert sap({"w": w}, gamma=2.0)["w"] == pytest.approx(0.2)
    assert sap({"w": w}, gamma=100.0, beta=0.6)["w"] == pytest.approx(0.6)
    half = torch.cat([w, torch.zeros(100)])
    assert sap({"w": half})["w"] == pytest.approx(1 - 0.5 * 0.9), "0.1 of the half that is left"
    assert parse("sap(gamma=2.0)", ALLOCATIONS)({"w": w}, None)["w"] == pytest.approx(0.2)


def test_sap_at_a_sparsity_prunes_in_proportion_to_what_is_spare() -> None:
    tensors = {"a": torch.tensor([4.0, 1.0]).repeat(50), "b": torch.tensor([9.0, 1.0]).repeat(50)}
    spare = [pq_index(x) for x in tensors.values()]  # with ½ and 1 the spare share is I itself
    found = sap(tensors, 0.3)
    assert found["a"] / found["b"] == pytest.approx(spare[0] / spare[1], rel=1e-6)
    assert sum(found.values()) / 2 == pytest.approx(0.3)
    with pytest.raises(GossamerError, match=r"0\.75 of the weights are zero already"):
        sap({"w": torch.cat([torch.ones(25), torch.zeros(75)])}, 0.5)


@pytest.mark.parametrize("wrong", [{"p": 1.0}, {"q": 0.4}, {"beta": 1.0}, {"gamma": -1}, {"eta": -2}])
def test_sap_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(GossamerError, match="sap wants"):
        sap({"a": torch.ones(3)}, 0.5, **wrong)


def test_global_keeps_the_same_number_of_each_tensor_at_least() -> None:
    scores = {"a": torch.arange(10.0) + 100, "b": torch.arange(10.0), "c": torch.tensor([0.1, 0.2])}
    count = {name: round((1 - s) * scores[name].numel()) for name, s in global_(scores, 0.5, least=4).items()}
    assert count == {"a": 5, "b": 4, "c": 2}, "what b and c keep is taken from a's entries nearest to the threshold"
    with pytest.raises(GossamerError, match="least=8"):
        global_(scores, 0.5, least=8)
    for wrong in (0, 1.5, True):
        with pytest.raises(GossamerError, match="1 or more"):
            global_(scores, 0.5, least=wrong)  # type: ignore[arg-type]


def test_by_takes_an_allocation_that_reads_scores() -> None:
    assert by(Wanda(), owl).needs == frozenset({"scores"})
    with pytest.raises(GossamerError, match="not erk"):
        by(Wanda(), erk)
    with pytest.raises(GossamerError, match="a score first"):
        by(owl, Wanda())  # type: ignore[arg-type]
