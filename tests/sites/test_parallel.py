"""Net-Trim's two ways through a network: every layer on the dense model's inputs, or each on what those before it put out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.core.pattern import NM
from gossamer.core.stats import Stats
from gossamer.scores import Wanda
from gossamer.solvers import ALPS, Asymmetric, NetTrim, Parallel, SparseGPT
from tests.sites.families import causal, ids


def inputs(model: nn.Module, name: str) -> Tensor:
    """What comes to a linear of the model, (tokens, in)."""
    seen: list[Tensor] = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0])), torch.no_grad():
        model(ids())
    return seen[0].flatten(0, 1)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]


@pytest.mark.parametrize("method", [NetTrim(), SparseGPT(), Wanda()], ids=repr)
def test_parallel_prunes_each_weight_on_the_dense_models_inputs(method: Any) -> None:
    dense = causal("llama")
    model = copy.deepcopy(dense)
    gossamer.prune(model, Parallel(method), "2:4", data=ids())
    for name in linears(dense):
        stats = Stats(dense.get_submodule(name).weight.shape[1], gram=True)
        stats.add(inputs(dense, name))
        alone = method if not isinstance(method, Wanda) else None
        w = dense.get_submodule(name).weight.detach()
        expected = alone(w, stats, NM(2, 4), None)[0] if alone else w * NM(2, 4).select(method(w, stats))
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected, rtol=1e-3, atol=1e-5)


def test_it_differs_from_the_method_alone_after_the_first_pruned_layer_only() -> None:
    alone, parallel = causal("llama"), causal("llama")
    gossamer.prune(alone, SparseGPT(), "2:4", data=ids())
    gossamer.prune(parallel, Parallel(SparseGPT()), "2:4", data=ids())
    same = {name: torch.equal(alone.get_submodule(name).weight, parallel.get_submodule(name).weight) for name in linears(alone)}
    assert all(same[name] for name in same if "layers.0.self_attn" in name and "o_proj" not in name), "inputs are alike there"
    assert not any(same[name] for name in same if "layers.1" in name)


def test_the_order_in_which_layers_go_does_not_matter() -> None:
    whole, apart = causal("llama"), causal("llama")
    gossamer.prune(whole, Parallel(SparseGPT()), "2:4", data=ids())
    gossamer.prune(apart, Parallel(SparseGPT()), "2:4", data=ids(), targets="*.layers.1.*")
    for name in linears(whole):
        if ".layers.1." in f".{name}":
            torch.testing.assert_close(whole.get_submodule(name).weight, apart.get_submodule(name).weight)


@pytest.mark.parametrize("seed", range(3))
def test_the_cascade_answers_as_the_dense_layers_did(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(24, 16, generator=generator), torch.randn(8, 24, generator=generator)
    x = torch.randn(96, 16, generator=generator)
    stats = Stats(16, gram=True)
    stats.add(x)
    there = NetTrim()(first, stats, NM(2, 4), None)[0]
    seen, wanted = x @ there.T, x @ first.T @ second.T
    stats = Stats(24, gram=True)
    stats.add(seen, x @ first.T)
    cascade, mask = Asymmetric(NetTrim())(second, stats, NM(2, 4), None)
    stats.dense = Stats(24, gram=True)
    stats.dense.add(x @ first.T)
    parallel, _ = Parallel(NetTrim())(second, stats, NM(2, 4), None)

    def off(u: Tensor) -> float:
        return float((seen @ u.T - wanted).norm() / wanted.norm())

    assert off(cascade) < min(off(parallel), off(NetTrim()(second, stats, NM(2, 4), None)[0]))
    ridge = 0.01 * seen.square().sum(0).mean()  # and its values are the best on their support, of that answer
    for row, keep, target, found in zip(second, mask, wanted.T, cascade, strict=True):
        k = seen[:, keep].double()
        h = k.T @ k + ridge * torch.eye(int(keep.sum()))
        best = torch.linalg.solve(h, k.T @ target.double() + ridge * row[keep].double())
        torch.testing.assert_close(found[keep].double(), best, rtol=1e-3, atol=1e-3)


def test_what_is_measured_on_gradients_reaches_the_method() -> None:
    alone, parallel = causal("llama"), causal("llama")
    gossamer.prune(alone, "Gradient", "2:4", data=ids())
    gossamer.prune(parallel, "Parallel(Gradient())", "2:4", data=ids())
    for name in linears(alone):
        assert torch.equal(alone.get_submodule(name).weight, parallel.get_submodule(name).weight)


@pytest.mark.parametrize("spec", ["Parallel(OBERT())", "Asymmetric(OBERT())", "DSnoT(init=OBERT())"])
def test_each_windows_own_gradients_reach_a_method_inside_another(spec: str) -> None:
    plain, inside, magnitude = causal("llama"), causal("llama"), causal("llama")
    block = {"data": ids(), "targets": "*.layers.0.*", "seed": 0}
    gossamer.prune(plain, "OBERT", "2:4", **block)
    gossamer.prune(inside, spec, "2:4", **block)
    gossamer.prune(magnitude, "Magnitude", "2:4", targets="*.layers.0.*")
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = [model.get_parameter(name) != 0 for model in (plain, inside, magnitude)]
    assert not torch.equal(kept[1], kept[2]), "without gradients it ranks by magnitude"
    if spec.startswith("Parallel"):
        assert torch.equal(kept[0], kept[1])


def test_what_the_solver_says_stands_in_the_report() -> None:
    report = gossamer.prune(causal("llama"), Parallel(ALPS()), "2:4", data=ids())
    assert all(row["steps"] >= 1 and row["damp"] > 0 for row in report.weights)


def test_experts_are_pruned_by_the_method_alone() -> None:
    alone, parallel = causal("mixtral"), causal("mixtral")
    how = {"data": ids(), "targets": "*.layers.0.*experts*"}
    gossamer.prune(alone, Wanda(), "2:4", **how)
    assert gossamer.prune(parallel, Parallel(Wanda()), "2:4", **how).totals["sparsity"] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), parallel.parameters(), strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Parallel(Asymmetric(ALPS()))", "looks at both models' inputs itself: take it alone"),
        ("Asymmetric(Parallel(ALPS()))", "looks at both models' inputs itself: take it alone"),
        ("Parallel(SynFlow())", "reaches a sparsity in rounds, which no method around it does"),
        ("Parallel(SparseLLM())", "solves a block's MLP as one, which no method around it does"),
    ],
)
def test_what_it_cannot_be_around(spec: str, message: str) -> None:
    model = causal("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gossamer.GossamerError, match=message):
        gossamer.prune(model, spec, "2:4", data=ids())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
