"""WeLore: the threshold against every threshold there is, the factors against the best approximation, and what is saved."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer
import gossamer.hf
from gossamer.core.structure import Linear
from gossamer.models import quiet
from gossamer.sites._low_rank import LowRank
from gossamer.sites._walk import targets
from gossamer.structures import WeLore
from gossamer.structures.welore import normal
from tests.sites.families import causal, ids

FAMILIES = ["llama", "qwen3", "gemma3", "phi", "opt", "gpt2", "gpt_neox", "bloom", "falcon"]


@pytest.fixture(autouse=True)
def _silent() -> Any:
    with quiet():
        yield


def spread(model: Any) -> Any:
    """Let the singular values of the linears fall off, each matrix's at its own pace, as those of trained models do."""
    for place, target in enumerate(targets(model)):
        w = target.matrices()[0]
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        w.copy_(u @ torch.diag(s[0] * torch.exp(-torch.linspace(0, 1 + 0.37 * place, len(s)))) @ v)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


def matrix(out: int, in_: int, values: list[float]) -> torch.Tensor:
    w = torch.zeros(out, in_)
    w[range(len(values)), range(len(values))] = torch.tensor(values)
    return w


def test_one_threshold_by_hand() -> None:
    """Normalised, the first one's values are 1, .5, .25, 0 and the second one's 1, .75, .5, 0."""
    first, second = [9.0, 5.0, 3.0, 1.0], [5.0, 4.0, 3.0, 1.0]
    values = [normal(torch.tensor(own)) for own in (first, second)]
    assert [own.tolist() for own in values] == [[1.0, 0.5, 0.25, 0.0], [1.0, 0.75, 0.5, 0.0]]
    how, linears = WeLore(), [Linear("a", 0, matrix(4, 4, first)), Linear("b", 0, matrix(4, 4, second))]
    assert how.ranks(values, 0.5) == [4, 4]  # one of four lost, or two: not more than half
    assert how.ranks(values, 0.6) == [1, 4]
    assert how.ranks(values, 0.8) == [1, 1]
    assert how.threshold(linears, values, 8) == 0.75  # 16 − 1·(4 + 4) of the first alone
    assert how.threshold(linears, values, 16) == 1.0
    assert how.threshold(linears, values, 3) == 0.5  # nothing is nearer to 3 than 8 is
    assert normal(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
def test_the_threshold_is_the_best_of_all(sparsity: float, tiny_llama: Callable[..., Any]) -> None:
    model, whole = spread(tiny_llama()), spread(tiny_llama())
    report = gossamer.shrink(model, "WeLore", sparsity=sparsity)
    inside = sum(p.numel() for p in whole.model.layers.parameters())
    rooms = {t.name: t.parameter for t in targets(whole)}
    normals = {}
    for name, w in rooms.items():
        s = torch.linalg.svdvals(w.double())
        normals[name] = ((s - s.min()) / (s.max() - s.min())).tolist()

    def left(k: float) -> dict[str, int]:
        kept = {name: sum(one >= k - 1e-6 for one in own) for name, own in normals.items()}
        return {name: n if 1 - n / min(rooms[name].shape) > 0.5 else min(rooms[name].shape) for name, n in kept.items()}

    def gone(found: dict[str, int]) -> int:
        sizes = {name: tuple(w.shape) for name, w in rooms.items()}
        return sum(m * n - found[name] * (m + n) for name, (m, n) in sizes.items() if found[name] < min(m, n))

    best = min(abs(gone(left(k)) - sparsity * inside) for own in normals.values() for k in own)
    assert abs(report.structure["sparsity"] * inside - sparsity * inside) == pytest.approx(best, abs=1e-3)
    found = left(report.blocks[0]["threshold"])
    assert sum(n < min(rooms[name].shape) for name, n in found.items()) > 0
    for name, rank in found.items():
        w, module = rooms[name].double(), model.get_submodule(name.removesuffix(".weight"))
        if rank == min(w.shape):
            assert torch.equal(module.weight, rooms[name])
            continue
        assert isinstance(module, LowRank)
        assert module.rank == rank
        product = module.outer.weight.detach().double() @ module.inner.weight.detach().double()
        rest = torch.linalg.svdvals(w)[rank:].square().sum().sqrt()  # the least that any matrix of this rank is away
        assert float((w - product).norm()) == pytest.approx(float(rest), rel=1e-4)
        torch.testing.assert_close(module.outer.weight.norm(), module.inner.weight.norm(), rtol=1e-4, atol=0)  # √Σ to both


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factored_model_computes_its_products_and_loads_again(family: str, tmp_path: Path) -> None:
    model, dense = spread(causal(family)), spread(causal(family))
    for parameter in [*model.parameters(), *dense.parameters()]:
        parameter.data += 0.01 if parameter.ndim == 1 else 0.0  # biases that are not zero
    report = gossamer.shrink(model, "WeLore", sparsity=0.4)
    assert not report.structure["plain"]
    for target in targets(dense):
        module = model.get_submodule(target.name.removesuffix(".weight"))
        if isinstance(module, LowRank):
            target.matrices()[0].copy_(module.outer.weight.detach() @ module.inner.weight.detach())
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(gossamer.load(tmp_path / "a")), logits(model))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(plain), logits(model))
    plain.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == json.loads((tmp_path / "a" / "config.json").read_text())
    assert torch.equal(logits(gossamer.load(tmp_path / "b")), logits(model))


def test_other_widths_stay_listed_and_blocks_may_go(tmp_path: Path) -> None:
    model = spread(causal("llama", num_hidden_layers=4, intermediate_size=256))
    gossamer.shrink(model, "CFSP(a=200.0)", sparsity=0.2, data=ids())
    assert set(model.config.quantization_config.packed.widths) == {"channels"}
    report = gossamer.shrink(model, "WeLore", sparsity=0.5)
    assert report.structure["widths"].keys() > {"channels"}
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(gossamer.load(tmp_path / "a")), logits(model))
    report = gossamer.shrink(model, "Depth", sparsity=0.5, data=ids())
    assert all(len(sizes) == 2 for sizes in report.structure["widths"].values())
    gossamer.save(model, tmp_path / "b")
    assert torch.equal(logits(gossamer.load(tmp_path / "b")), logits(model))


def test_the_factors_are_pruned_and_packed_as_any_linear(tmp_path: Path) -> None:
    model = spread(causal("llama"))
    gossamer.shrink(model, "WeLore", sparsity=0.4)
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    gossamer.save(model, tmp_path / "a", packed=True)
    torch.testing.assert_close(logits(gossamer.load(tmp_path / "a")), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(gossamer.GossamerError, match="one MLP whose channels can be removed"):
        gossamer.shrink(model, "ZipLM", sparsity=0.2, data=ids())
    with pytest.raises(gossamer.GossamerError, match="holds products of two matrices already"):
        gossamer.shrink(model, "WeLore", sparsity=0.2)


def test_plain_transformers_does_not_load_rubbish(tmp_path: Path) -> None:
    model = spread(causal("llama"))
    gossamer.shrink(model, "WeLore", sparsity=0.4)
    gossamer.save(model, tmp_path / "a")
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    got = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert got.returncode or "MISSING" in got.stderr or "newly initialized" in got.stderr


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        ("ranks.mlp.no_proj", [4, 4], "which is no linear of block 0"),
        ("ranks.mlp", [4, 4], "which is no linear of block 0"),
        ("ranks.mlp.up_proj", [4], "lists 1 widths of ranks.mlp.up_proj, and the model has 2 blocks"),
        ("ranks.mlp.up_proj", [4, 33], "lists 33 ranks of mlp.up_proj for block 1"),
        ("ranks.mlp.up_proj", [4, 0], "no list of positive integers"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_in_one_line(kind: str, sizes: list[int], told: str, tmp_path: Path) -> None:
    model = spread(causal("llama"))
    gossamer.shrink(model, "WeLore", sparsity=0.4)
    gossamer.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["widths"][kind] = sizes
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(gossamer.GossamerError, match=told) as raised:
        gossamer.load(tmp_path / "a")
    assert "\n" not in str(raised.value)


def test_what_it_cannot_do_is_said_before_it_starts() -> None:
    model = causal("llama")
    with pytest.raises(gossamer.GossamerError, match=r"can remove at most 0\.\d+ of the parameters in the blocks; 0.99"):
        gossamer.shrink(model, "WeLore", sparsity=0.99)
    with pytest.raises(gossamer.GossamerError, match="is a stack of experts"):
        gossamer.shrink(causal("mixtral"), "WeLore", sparsity=0.2)
    with pytest.raises(gossamer.GossamerError, match=r"WeLore wants 0\.5 <= least < 1"):
        gossamer.shrink(model, "WeLore(least=0.2)", sparsity=0.2)
    assert not any(isinstance(module, LowRank) for module in model.modules())
