"""What is measured on the whole model, against its definition: Hessians by hand, the conservation of flow, rounds, errors."""

import math

import pytest
import torch

import gossamer
from gossamer import NM, Gradient, GraSP, Magnitude, SparseGPT, SynFlow, Wanda
from gossamer.core.allocate import erk, global_, in_steps, owl, searched
from gossamer.core.allocate._probed import probe
from gossamer.core.errors import GossamerError
from gossamer.sites._gradients import gradients
from gossamer.sites._walk import targets
from gossamer.sites._whole import flow, hessian_gradients, losses
from tests.sites.families import causal, ids

SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
ROW = "Unstructured(per='tensor')"


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids(3, 6).split(2)]


def zeros(model: torch.nn.Module) -> dict[str, int]:
    return {t.name: int((t.parameter == 0).sum()) for t in targets(model)}


def test_hessian_gradients_are_those_of_the_explicit_hessian() -> None:
    model = causal("llama", dtype=torch.float64, **SMALL)
    chosen = [t for t in targets(model) if t.name.endswith(("k_proj.weight", "up_proj.weight"))]
    sizes = [t.parameter.numel() for t in chosen]
    start = torch.cat([t.parameter.flatten() for t in chosen])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(chosen, flat.split(sizes), strict=True)
        moved = {t.name: part.view(t.parameter.shape) for t, part in parts}
        rows = [
            torch.func.functional_call(model, moved, kwargs={"input_ids": w, "labels": w, "use_cache": False}).loss
            for w in ids(3, 6).split(1)
        ]
        return torch.stack(rows).mean()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, start)
        gradient = torch.autograd.functional.jacobian(loss, start)
    found = hessian_gradients(model, batches(), chosen, gradients(model, batches(), chosen))
    expected = dict(zip(found, (hessian @ gradient).split(sizes), strict=True))
    for name, value in found.items():
        torch.testing.assert_close(value.double().flatten(), expected[name], rtol=1e-4, atol=1e-7)


def test_square_gradients_are_the_mean_of_each_windows_own() -> None:
    model = causal("llama", **SMALL)
    own = gradients(model, batches(), targets(model), each=True)
    found = gradients(model, batches(), targets(model), squared=True)
    assert found.keys() == own.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, own[name].square().mean(0), rtol=1e-5, atol=1e-12)


def test_removing_what_grasp_ranks_lowest_raises_the_gradient_flow() -> None:
    norms = {}
    for method in (GraSP(), Magnitude()):
        model = causal("llama")
        gossamer.prune(model, method, ROW, sparsity=0.02, allocate="global_", data=ids(3, 6))
        found = gradients(model, batches(), targets(model))
        norms[type(method).__name__] = sum(float(g.square().sum()) for g in found.values())
    assert norms["GraSP"] > norms["Magnitude"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt"])
def test_flow_is_conserved_from_layer_to_layer(family: str) -> None:
    model = causal(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = flow(model, targets(model))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items()), "put back to the bit"
    assert model.config._attn_implementation != "gossamer_flow"
    through = {t.name: float((t.parameter.abs() * found[t.name]).sum()) for t in targets(model)}
    for block in range(2):
        inside = {name: value for name, value in through.items() if f".{block}." in name}
        attention = [value for name, value in inside.items() if "attn" in name]
        mlp = [value for name, value in inside.items() if "attn" not in name]
        assert attention == pytest.approx([attention[0]] * 4, rel=1e-4), "q, k, v and o carry the same"
        assert mlp == pytest.approx([mlp[0]] * len(mlp), rel=1e-4), "gate, up and down carry the same"
    assert all(float(f.min()) >= 0 for f in found.values())


def test_flow_is_the_product_over_paths_where_there_is_nothing_else() -> None:
    """Of an MLP alone: R's part through an entry of down is the norm's constant times what comes to it times what leaves it."""
    model = causal("opt", num_hidden_layers=1, hidden_size=8, ffn_dim=8, word_embed_proj_dim=8, num_attention_heads=2)
    block = model.model.decoder.layers[0]
    chosen = {t.name.split(".")[-2]: t for t in targets(model)}
    found = flow(model, targets(model))
    seen = {}
    w1, w2 = block.fc1.weight.abs(), block.fc2.weight.abs()
    hook = block.fc2.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    flow(model, targets(model))
    hook.remove()
    # every entry of fc2's output reaches R with one weight of its own: the score of (i, j) is |w2_ij| · x_j · that weight
    weight = found[chosen["fc2"].name] / seen["x"].flatten()
    torch.testing.assert_close(weight, weight[:, :1].expand_as(weight), rtol=1e-4, atol=0)
    # and of fc1 (identity for its activation): x_in_j · Σ_i weight_i |w2_ik|
    out = (weight[:, :1] * w2).sum(0)
    inner = found[chosen["fc1"].name] / out[:, None]
    torch.testing.assert_close(inner, inner[:1].expand_as(inner), rtol=1e-4, atol=0)
    assert w1.shape == inner.shape


def test_a_model_that_takes_no_embeddings_has_no_flow() -> None:
    model = causal("llama")
    model.forward = lambda input_ids: None  # type: ignore[method-assign, assignment]
    with pytest.raises(GossamerError, match="takes no embeddings"):
        flow(model, targets(model))


def test_rounds_are_prunings_at_rising_sparsity() -> None:
    at_once, apart = causal("llama"), causal("llama")
    gossamer.prune(at_once, SynFlow(rounds=3), ROW, sparsity=0.875, allocate="global_")
    for sparsity in (0.5, 0.75, 0.875):
        gossamer.prune(apart, SynFlow(rounds=1), ROW, sparsity=sparsity, allocate="global_")
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), apart.parameters(), strict=True))
    once = causal("llama")
    gossamer.prune(once, SynFlow(rounds=1), ROW, sparsity=0.875, allocate="global_")
    assert zeros(once) != zeros(at_once)


def test_synflow_in_rounds_leaves_every_layer_its_flow_where_one_round_cuts_it() -> None:
    model = causal("llama")
    report = gossamer.prune(model, "SynFlow(rounds=30)", ROW, sparsity=0.99, allocate="global_")
    assert report.totals["nnz"] == round(0.01 * report.totals["entries"])
    left = flow(model, targets(model))
    assert all(float((t.parameter.abs() * left[t.name]).sum()) > 0 for t in targets(model))


def test_a_sparsity_that_is_given_for_each_weight_has_one_round() -> None:
    shares = {"*.self_attn.*": 0.25, "*.mlp.*": 0.75}
    reports = [gossamer.prune(causal("llama"), SynFlow(rounds=n), ROW, sparsity=7 / 12, allocate=shares) for n in (1, 9)]
    assert [row["nnz"] for row in reports[0].weights] == [row["nnz"] for row in reports[1].weights]


def test_snip_is_gradient_ranked_over_all_weights() -> None:
    model = causal("llama")
    chosen = targets(model)
    found = gradients(model, batches(), chosen)
    sensitivity = torch.cat([(t.parameter * found[t.name]).abs().flatten() for t in chosen])
    sensitivity /= sensitivity.sum()
    threshold = sensitivity.sort(descending=True).values[round(0.8 * sensitivity.numel()) - 1]
    gossamer.prune(model, "Gradient", ROW, sparsity=0.2, allocate="global_", data=ids(3, 6))
    kept = torch.cat([(t.parameter != 0).flatten() for t in chosen])
    assert int(kept.sum()) == round(0.8 * kept.numel())
    apart = kept != (sensitivity >= threshold)
    assert not apart.any() or float((sensitivity[apart] / threshold - 1).abs().max()) < 1e-5, "but for rounding"


def test_ecoflap_probes_the_models_own_loss() -> None:
    model = causal("llama", dtype=torch.float64)
    chosen = targets(model)
    evaluated = losses(model, batches())
    with torch.no_grad():
        expected = [float(model(input_ids=w, labels=w).loss) for w in ids(3, 6).split(1)]
    assert [f() for f in evaluated] == pytest.approx(expected)
    for seed, t in enumerate(chosen):
        generator = torch.Generator().manual_seed(seed)
        along = []
        for window in ids(3, 6).split(1):
            gradient = gradients(model, [{"input_ids": window}], [t])[t.name]
            along.append(abs(float((gradient * torch.randn(gradient.shape, generator=generator)).sum())))
        assert probe([t.matrices()], evaluated, 1e-3, seed) == pytest.approx(sum(along) / 3, rel=0.02, abs=1e-3), t.name


@pytest.mark.parametrize("method", [Magnitude(), SparseGPT(), Gradient()])
def test_errors_are_those_of_the_outputs(method: object) -> None:
    model = causal("llama", num_hidden_layers=1)
    dense = causal("llama", num_hidden_layers=1)
    tables = {}

    def look(tensors: dict, sparsity: float, errors: object) -> dict[str, float]:
        tables.update(errors([0.0, 0.5, 0.75]))  # type: ignore[operator]
        return dict.fromkeys(tensors, sparsity)

    look.needs = searched.needs  # type: ignore[attr-defined]
    gossamer.prune(model, method, ROW, sparsity=0.5, allocate=look, data=ids())  # type: ignore[arg-type]
    inputs = []
    hook = dense.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    with torch.no_grad():
        dense(input_ids=ids())
    hook.remove()
    name = "model.layers.0.self_attn.q_proj.weight"
    w, pruned = dense.state_dict()[name], model.state_dict()[name]  # the first weight: its inputs are the dense model's
    expected = ((inputs[0] @ (w - pruned).T).square().sum() / (inputs[0] @ w.T).square().sum()).item()
    assert tables[name][0] == 0
    assert tables[name][1] == pytest.approx(expected, rel=1e-3)
    assert tables[name][2] > tables[name][1]


@pytest.mark.parametrize("allocate", ["by(Magnitude, owl(spread=0.4))", "searched(steps=8)", "by(Wanda, global_)", erk])
def test_n_of_m_mixed_over_the_weights_has_its_average(allocate: object) -> None:
    model = causal("llama")
    report = gossamer.prune(model, "SparseGPT", "4:8", allocate=allocate, data=ids())
    assert report.totals["sparsity"] == 0.5
    found = set()
    for target in targets(model):
        counts = {int(n) for n in target.parameter.view(-1, 8).count_nonzero(1)}
        assert len(counts) == 1, "one n for all groups of a weight"
        found |= counts
    assert found - {4}
    assert report.recipe["pattern"] == "4:8"


def test_mixed_n_of_m_follows_the_allocation() -> None:
    model = causal("llama")
    wanted = {t.name: t.matrices() for t in targets(model)}
    shares = in_steps(erk(wanted, 0.75), {n: x.numel() for n, x in wanted.items()}, 0.75, 8)
    report = gossamer.prune(model, Wanda(), NM(2, 8), allocate=erk, data=ids())
    assert {row["name"]: row["sparsity"] for row in report.weights} == shares


def test_a_total_of_its_own() -> None:
    model = causal("llama")
    report = gossamer.prune(model, "Magnitude", ROW, allocate="sap")
    assert 0 < report.totals["sparsity"] < 0.9
    before = report.totals["nnz"]
    assert gossamer.prune(model, "Magnitude", ROW, allocate="sap").totals["nnz"] < before, "it goes on from what is left"
    with pytest.raises(GossamerError, match="needs a sparsity"):
        gossamer.prune(model, "Magnitude", ROW, allocate="erk")


def test_an_allocation_may_rank_by_another_score_for_a_method_that_has_none() -> None:
    model = causal("llama")
    gossamer.prune(model, "SparseGPT", ROW, sparsity=0.5, allocate="by(Magnitude, global_)", data=ids())
    shares = global_({t.name: t.matrices().abs() for t in targets(causal("llama"))}, 0.5)
    found = {name: count / t.parameter.numel() for (name, count), t in zip(zeros(model).items(), targets(model), strict=True)}
    assert found == pytest.approx(shares)
    with pytest.raises(GossamerError, match=r"by\(Wanda, global_\(floor=0.1\)\)"):
        gossamer.prune(model, "SparseGPT", ROW, sparsity=0.5, allocate="global_(floor=0.1)", data=ids())
    with pytest.raises(GossamerError, match="is a name, a function or a mapping"):
        gossamer.prune(model, "SparseGPT", ROW, sparsity=0.5, allocate="Wanda", data=ids())
    assert owl.needs == frozenset({"wanda"})


def test_random_masks_take_the_densities_of_another_score() -> None:
    """Random pruning at initialisation in layer densities borrowed from SynFlow: exact counts, whatever the seed."""
    counts = []
    for seed in (0, 1):
        model = causal("llama")
        gossamer.prune(model, f"Random({seed})", ROW, sparsity=0.8, allocate="by(SynFlow, global_)")
        counts.append(zeros(model))
    assert counts[0] == counts[1]
    sizes = [math.prod(t.parameter.shape) for t in targets(model)]
    assert len({round(n / size, 3) for n, size in zip(counts[0].values(), sizes, strict=True)}) > 1


@pytest.mark.parametrize("method", ["GraSP", "Gradient"])
def test_no_loss_no_method(method: str) -> None:
    with pytest.raises(GossamerError, match=f"{method} takes the next-token loss"):
        gossamer.prune(causal("llama"), method, "2:4", data=[{"inputs_embeds": torch.ones(1, 2, 32)}])
    mappings = [{"inputs_embeds": torch.ones(1, 2, 32)}]
    with pytest.raises(GossamerError, match="allocate=ecoflap takes the next-token loss"):
        gossamer.prune(causal("llama"), "Magnitude", ROW, sparsity=0.5, allocate="ecoflap", data=mappings)


@pytest.mark.parametrize("method", ["GraSP", "Gradient", "OBERT"])
def test_padding_has_no_next_token(method: str) -> None:
    model = causal("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    with pytest.raises(GossamerError, match="windows with padding"):
        gossamer.prune(model, method, "2:4", data=[{"input_ids": ids(2, 8), "attention_mask": mask}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "allocate", "told"),
    [
        ("Fisher", "uniform", ["gradients: "]),
        ("GraSP", "uniform", ["gradients: ", "second derivatives: "]),
        ("SynFlow(rounds=3)", "uniform", ["rounds of SynFlow(rounds=3)"]),
        ("Magnitude", "ecoflap(samples=2)", ["losses: "]),
        ("Magnitude", "searched(steps=4)", ["errors: "]),
    ],
)
def test_what_takes_long_shows_how_far_it_is(
    method: str, allocate: str, told: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    gossamer.prune(causal("llama"), method, ROW, sparsity=0.5, allocate=allocate, data=ids(), progress=True)
    shown = capfd.readouterr().err
    assert all(line in shown for line in told), shown
    gossamer.prune(causal("llama"), method, ROW, sparsity=0.5, allocate=allocate, data=ids(), progress=False)
    assert capfd.readouterr().err == ""
