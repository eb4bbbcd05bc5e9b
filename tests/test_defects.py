"""Defects of other libraries, each with a test here that it is none of ours."""

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.core.pattern import NM, Pattern, Unstructured
from gossamer.core.stats import Stats
from gossamer.scores import Magnitude, Wanda
from gossamer.solvers import Mask, SparseGPT
from tests.sites.families import CAUSAL, causal, ids


@pytest.fixture(scope="module")
def correlated() -> tuple[Tensor, Stats]:
    """A 512 × 512 layer and the statistics of its correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 512, generator=generator))[0]
    x = torch.randn(2048, 512, generator=generator) / torch.arange(1, 513) @ basis.T
    stats = Stats(512, gram=True)
    stats.add(x)
    return torch.randn(512, 512, generator=generator), stats


def error(w: Tensor, found: Tensor, stats: Stats) -> float:
    gap = (w - found).double()
    return float((gap @ stats.symmetric_gram().double() * gap).sum())


@pytest.mark.parametrize("method", ["Magnitude", "Wanda", "SparseGPT"])
def test_the_head_and_the_embeddings_are_left_alone(method: str) -> None:
    for family in CAUSAL:
        model = causal(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report = gossamer.prune(model, method, "2:4", data=ids())
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {row["name"] for row in report.weights}, family
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert float((module.weight == 0).float().mean()) < 0.1, family


@pytest.mark.parametrize("sparsity", [None, 0.75])
@pytest.mark.parametrize("method", ["Magnitude", "Wanda", "SparseGPT"])
def test_one_of_four_kept_is_three_quarters_zeros(method: str, sparsity: float | None) -> None:
    model = causal("llama")
    report = gossamer.prune(model, method, "1:4", sparsity=sparsity, data=ids())
    assert {row["sparsity"] for row in report.weights} == {0.75}
    assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 64 * 32 * 3 // 4


@pytest.mark.parametrize("family", list(CAUSAL))
def test_magnitude_never_ends_well_with_no_zeros(family: str) -> None:
    model = causal(family)
    report = gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=1e-3)
    state = model.state_dict()
    zeros = sum(int((state[row["name"]] == 0).sum()) for row in report.weights)
    assert zeros == report.totals["entries"] - report.totals["nnz"] > 0


def test_pruning_nothing_is_an_error() -> None:
    model = causal("llama")
    with pytest.raises(gossamer.GossamerError, match="no weight matches"):
        gossamer.prune(model, "Magnitude", "2:4", targets="*.c_fc")
    bare = causal("llama", num_hidden_layers=0)
    with pytest.raises(gossamer.GossamerError):
        gossamer.prune(bare, "Magnitude", "2:4")


@pytest.mark.parametrize(("pattern", "sparsity"), [(Unstructured(), 0.5), (NM(2, 4), None)], ids=repr)
def test_sparsegpt_returns_its_update_and_halves_its_own_masks_error(
    correlated: tuple[Tensor, Stats], pattern: Pattern, sparsity: float | None
) -> None:
    w, stats = correlated
    found, mask = SparseGPT()(w, stats, pattern, sparsity)
    assert float((found != w)[mask].float().mean()) > 0.9, "the kept weights have moved"
    ours = error(w, found, stats)
    assert 2 * ours <= error(w, w * mask, stats)
    for score in (Magnitude(), Wanda()):
        assert ours < error(w, Mask(score)(w, stats, pattern, sparsity)[0], stats)


def test_wanda_compares_within_an_output_row(correlated: tuple[Tensor, Stats]) -> None:
    w, stats = correlated
    scaled = w * torch.logspace(-3, 3, 512)[:, None]  # over the whole layer, the first rows would all go
    assert Wanda.per == "row"
    pattern = Unstructured(per=Wanda.per)
    mask = Mask(Wanda())(scaled, stats, pattern, 0.5)[1]
    assert (mask.sum(1) == 256).all()
    assert torch.equal(mask, Mask(Wanda())(w, stats, pattern, 0.5)[1]), "the scale of a row makes no difference"
    llama = causal("llama")
    gossamer.prune(llama, "Wanda", "Unstructured", sparsity=0.5, data=ids())
    assert (llama.model.layers[1].self_attn.o_proj.weight.count_nonzero(1) == 16).all()


@pytest.mark.parametrize("method", ["Magnitude", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_ties_do_not_go_together(method: str, sparsity: float) -> None:
    model = causal("llama")
    for block in model.model.layers:
        for parameter in block.parameters():
            if parameter.ndim == 2:
                parameter.data.fill_(0.5)
    report = gossamer.prune(model, method, "Unstructured(per='tensor')", sparsity=sparsity, data=ids())
    for row in report.weights:
        entries = row["shape"][0] * row["shape"][1]
        assert row["nnz"] == round((1 - sparsity) * entries), row["name"]


WATCHED = """
import warnings
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

def seen():
    found = {}
    for holder in (torch, torch.nn, torch.nn.functional, torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.optim.Optimizer,
                   torch.nn.Parameter, PreTrainedModel, AutoModelForCausalLM, transformers.modeling_utils, warnings):
        for name, value in vars(holder).items():
            if callable(value) or isinstance(value, (classmethod, staticmethod)):
                found[str(holder), name] = id(value)
    found["registered"] = sorted(map(str, transformers.AutoConfig.__subclasses__()))
    found["modes"] = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed())
    return found

before = seen()
import gossamer
for name in MODULES:
    __import__(name)
after = seen()
changed = [key for key in before if before[key] != after.get(key)]
assert not changed, changed
"""


def test_importing_every_file_patches_nothing_and_prints_nothing() -> None:
    gpu = () if importlib.util.find_spec("triton") else (".triton", "._gpu", "._ptx", "._hopper", "._prompt")
    found = [m.name for m in pkgutil.walk_packages(gossamer.__path__, "gossamer.")]
    modules = [name for name in found if not name.endswith(("__main__", *gpu))]
    code = WATCHED.replace("MODULES", repr(modules))
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:gossamer", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pruning_leaves_nothing_behind_in_the_model(family: str) -> None:
    model = causal(family)
    kinds = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    config = model.config.to_json_string()
    linear, forward = torch.nn.functional.linear, torch.nn.Linear.forward
    gossamer.prune(model, "SparseGPT", "2:4", data=ids())
    assert kinds == {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config.to_json_string() == config
    assert (linear, forward) == (torch.nn.functional.linear, torch.nn.Linear.forward)


def test_no_sparsity_config_is_written(tmp_path: Path, tiny_dir: Path) -> None:
    report = gossamer.prune_checkpoint(tiny_dir, tmp_path / "streamed", "Magnitude", "2:4")
    model = causal("llama")
    gossamer.prune(model, "Magnitude", "2:4")
    gossamer.save(model, tmp_path / "saved", report=report)
    for folder in ("streamed", "saved"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert "sparsity_config" not in json.dumps(config)
        assert "compression_config" not in config
        assert "quantization_config" not in config


def test_owl_works_and_differs_by_block() -> None:
    model = causal("llama", num_hidden_layers=4)
    model.model.layers[2].mlp.up_proj.weight.data[:, :6] *= 100  # outliers
    report = gossamer.prune(model, "Wanda", "Unstructured(per='tensor')", sparsity=0.7, allocate="owl", data=ids())
    assert abs(report.totals["nnz"] - 0.3 * report.totals["entries"]) <= len(report.weights)
    by_block = {row["block"]: row["sparsity"] for row in report.weights if row["name"].endswith("up_proj.weight")}
    assert min(by_block, key=lambda block: by_block[block]) == 2, "the block with the outliers stays the densest"


def test_no_file_of_the_package_names_a_model_family() -> None:
    """The families are transformers' own list of them; the names that are plain words too are left out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    plain = {"align", "auto", "bit", "codegen", "dot", "git", "led", "mask", "mode", "sam", "seed", "table", "time"}
    families = {re.sub(r"[-_.]", "", name.lower()) for name in CONFIG_MAPPING_NAMES} - plain
    assert {"llama", "gpt2", "opt", "qwen3", "mixtral", "bloom"} <= families
    files = [f for f in Path(gossamer.__file__).parent.rglob("*.py") if f.name != "shapes.py"]  # sizes of known models, by name
    assert len(files) > 20
    for file in files:
        words = re.findall(r"[a-z0-9]+", strip(file).replace("_", "").lower())
        assert not families & set(words), f"{file.name} names {sorted(families & set(words))}"


def strip(file: Path) -> str:
    """Return a file's code without docstrings and comments."""
    import ast

    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body: Any = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return ast.unparse(tree)
