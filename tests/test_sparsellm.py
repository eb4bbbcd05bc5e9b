"""SparseLLM: each of its closed forms against the minimum found another way, and the whole on models."""

from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.stats import Stats
from gossamer.solvers.sparsellm import inner, outer, refit
from tests.sites.families import causal, ids

GRID = torch.linspace(-20, 20, 400_001, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_p_is_the_least_squares_solution_of_both_terms_stacked() -> None:
    w, y, p, beta, gamma = random(3, 7), random(5, 3, seed=1), random(5, 7, seed=2), 0.7, 1.9
    stacked = torch.cat([beta**0.5 * w, gamma**0.5 * torch.eye(7, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([beta**0.5 * y, gamma**0.5 * p], dim=1).T).solution.T
    torch.testing.assert_close(inner(w, y, p, beta, gamma), wanted)


@pytest.mark.parametrize("times", [1.0, -0.8])
def test_z_under_relu_is_the_least_on_a_fine_grid(times: float) -> None:
    alpha, gamma = 0.6, 1.7
    made, p = random(40), 2 * random(40, seed=1)
    found = outer(nn.ReLU(), random(40, seed=2), made, p, times, alpha, gamma)

    def cost(z: torch.Tensor) -> torch.Tensor:
        return alpha * (z - made[:, None]) ** 2 + gamma * (p[:, None] - times * z.clamp_min(0)) ** 2

    least = cost(GRID[None]).amin(1)
    assert bool((cost(found[:, None])[:, 0] <= least + 1e-12).all())
    assert bool((cost(found[:, None])[:, 0] >= least - 1e-6).all())


def test_z_under_another_activation_never_costs_more_and_ends_near_a_minimum() -> None:
    made, p, now = random(200), 2 * random(200, seed=1), random(200, seed=2)

    def cost(z: torch.Tensor) -> torch.Tensor:
        return (z - made) ** 2 + (p - nn.functional.silu(z)) ** 2

    found = outer(nn.SiLU(), now, made, p, 1.0, 1.0, 1.0)
    assert bool((cost(found) <= cost(now)).all())
    assert bool((cost(found) <= cost(made)).all())
    for _ in range(20):
        found = outer(nn.SiLU(), found, made, p, 1.0, 1.0, 1.0)
    slope = torch.func.grad(lambda z: cost(z).sum())(found)
    assert float(slope.abs().median()) < 1e-3


def test_the_refit_is_the_damped_least_squares_solution() -> None:
    w, x, target = random(3, 6).float(), random(50, 6, seed=1).float(), random(50, 3, seed=2).float()
    stats = Stats(6, gram=True)
    stats.add(x)
    damp = 0.1 * float((x.double().T @ x.double()).diagonal().mean())
    h = x.double().T @ x.double() + damp * torch.eye(6, dtype=torch.float64)
    wanted = (target.double().T @ x.double() + damp * w.double()) @ torch.linalg.inv(h)
    torch.testing.assert_close(refit(w, target.T @ x, stats, 0.1).double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("Unstructured", 0.7), ("2:4", None)])
def test_it_leaves_no_more_of_an_mlp_than_sparsegpt(family: str, pattern: str, sparsity: float | None) -> None:
    model = causal(family)
    report = gossamer.prune(model, "SparseLLM", pattern, sparsity=sparsity, data=ids(), progress=False)
    rows: list[dict[str, Any]] = [row for row in report.weights if "mlp_error" in row]
    assert rows
    assert all(row["mlp_error"] <= row["mlp_error_start"] for row in rows)
    assert any(row["steps"] > 0 for row in rows)
    assert report.totals["sparsity"] == pytest.approx(sparsity or 0.5, abs=0.01)


def test_without_steps_it_is_sparsegpt() -> None:
    one, other = causal("llama"), causal("llama")
    gossamer.prune(one, "SparseLLM(steps=0)", "2:4", data=ids(), progress=False)
    gossamer.prune(other, "SparseGPT", "2:4", data=ids(), progress=False)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(gossamer.GossamerError, match="SparseLLM wants steps >= 0"):
        gossamer.prune(causal("llama"), "SparseLLM(gamma=0)", "2:4", data=ids())
