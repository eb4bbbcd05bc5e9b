"""SliceGPT: a rotation changes nothing, the axes are the principal ones, and what is cut is cut from every weight."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.core.spec import spec
from gossamer.core.structure import Skeleton, Structure
from gossamer.sites._skeleton import ModelSkeleton
from tests.sites.families import causal, ids
from tests.structures.test_depth import states

ROTATABLE = ["llama", "mistral", "qwen3"]


@spec
class Rotate(Structure):
    """Take the hidden states to the first so many axes of a random basis."""

    stay: int = 32
    removes: ClassVar[frozenset[str]] = frozenset({"hidden"})
    needs: ClassVar[frozenset[str]] = frozenset({"states"})

    def __call__(self, model: Skeleton, sparsity: float) -> None:
        noise = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model.project(torch.linalg.qr(noise)[0][:, : self.stay])


def with_gains(family: str, **overrides: Any) -> Any:
    """Return a model whose norms have gains that differ."""
    model = causal(family, **overrides)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ROTATABLE)
def test_a_full_basis_leaves_the_logits_as_they_were(family: str, tied: bool) -> None:
    model = with_gains(family, tie_word_embeddings=tied, rms_norm_eps=1e-5)  # the ε of real models
    before, queries = logits(model), model.model.layers[0].self_attn.q_proj.weight.clone()
    Rotate()(ModelSkeleton(model, Rotate(), [{"input_ids": ids()}], None, False), 0.5)  # `shrink` refuses what removes nothing
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=2e-6)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight, queries)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ROTATABLE)
def test_a_narrower_model_is_the_projected_one(family: str) -> None:
    """P x in place of x after every block, and norms that see its length alone, is what the narrower weights compute."""
    model, narrow = with_gains(family), with_gains(family)
    for one in (model, narrow):  # so that the ε of the norms, which is to the mean of fewer entries, is nothing
        one.model.embed_tokens.weight.data *= 50
    gossamer.shrink(narrow, Rotate(stay=20), sparsity=0.5, data=ids())
    noise = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(noise)[0][:, :20]
    p = (q @ q.T).float()
    model.model.embed_tokens.weight.data @= p
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.data = p @ linear.weight.data
    torch.testing.assert_close(logits(narrow), logits(model), rtol=1e-3, atol=1e-5)
    assert [b.mlp.up_proj.weight.shape[1] for b in narrow.model.layers] == [20, 20]


def test_the_axes_are_the_principal_ones() -> None:
    model, by_hand = with_gains("llama"), with_gains("llama")
    x = torch.cat([s.flatten(0, 1) for s in states(by_hand, ids())]).double()
    _, values, axes = torch.linalg.svd(x / x.norm(dim=1, keepdim=True), full_matrices=False)  # not by an eigenproblem
    report = gossamer.shrink(model, "SliceGPT", sparsity=0.25, data=ids())
    assert report.blocks[0]["explained"] == pytest.approx(float((values[:24] ** 2).sum() / (values**2).sum()), rel=1e-5)
    found = model.model.embed_tokens.weight
    wanted = by_hand.model.embed_tokens.weight @ axes[:24].T.float()
    torch.testing.assert_close(found.abs(), wanted.abs(), rtol=1e-3, atol=1e-5)  # an axis has no sign


@pytest.mark.parametrize("family", ROTATABLE)
def test_it_is_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    model = with_gains(family, tie_word_embeddings=True)
    report = gossamer.shrink(model, "SliceGPT", sparsity=0.25, data=ids())
    assert report.structure["plain"]
    assert model.config.hidden_size == 24
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a")), logits(model))
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(1, 4)}
    assert torch.equal(gossamer.load(tmp_path / "a").generate(ids(1, 4), **how), model.generate(ids(1, 4), **how))


def test_after_other_structure(tmp_path: Path) -> None:
    model = with_gains("llama")
    gossamer.shrink(model, "CFSP(a=5000.0)", sparsity=0.2, data=ids())
    report = gossamer.shrink(model, "SliceGPT", sparsity=0.25, data=ids())
    assert not report.structure["plain"]
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(gossamer.load(tmp_path / "a")), logits(model))


REFUSED = {
    "gemma3": "does not read its hidden states through one norm each time",  # norms after attention and MLP too
    "phi": "no plain head and embeddings",
    "gpt2": "wpe has the width of the hidden states, and is no norm or linear that is known",
    "mixtral": "one MLP whose channels can be removed",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_rotated_is_refused_unchanged(family: str) -> None:
    model = causal(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(gossamer.GossamerError, match=REFUSED[family]):
        gossamer.shrink(model, "SliceGPT", sparsity=0.25, data=ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_norm_that_takes_the_mean_away_is_refused() -> None:
    model = causal("llama")
    for at in ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm"):
        model.set_submodule(at, torch.nn.LayerNorm(32, bias=False))
    with pytest.raises(gossamer.GossamerError, match="do more than divide by the root mean square"):
        gossamer.shrink(model, "SliceGPT", sparsity=0.25, data=ids())


@pytest.mark.parametrize("sparsity", [0.05, 0.95])
def test_sparsities_of_nothing_or_all_are_refused(sparsity: float) -> None:
    with pytest.raises(gossamer.GossamerError, match=r"would leave (0|32) of 32 directions: give another"):
        gossamer.shrink(causal("llama"), "SliceGPT", sparsity=sparsity, data=ids())


def test_the_width_is_one_that_its_configuration_may_have(tmp_path: Path) -> None:
    """transformers refuses to save, and to open, hidden states that the heads do not divide."""
    model = causal("llama", hidden_size=36, num_attention_heads=3, num_key_value_heads=3, head_dim=12)
    report = gossamer.shrink(model, "SliceGPT", sparsity=0.05, data=ids())
    assert model.config.hidden_size == 33, "34 is nearer to 0.95 of 36"
    assert report.structure is not None
    gossamer.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    with pytest.raises(gossamer.GossamerError, match="not a multiple of the number of attention heads"):
        gossamer.shrink(causal("llama"), "SliceGPT(multiple=31)", sparsity=0.03, data=ids())
