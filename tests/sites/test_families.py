"""One code path prunes every family: exact zeros, every block, everything else untouched."""

import pytest
import torch

import gossamer
from gossamer.sites._walk import blocks_of, targets
from tests.sites.families import CAUSAL, causal, ids

METHODS = [("Magnitude", "2:4"), ("Wanda", "2:4"), ("SparseGPT", "Unstructured"), ("RIA", "4:8"), ("Gradient", "Unstructured")]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize(("method", "pattern"), METHODS)
def test_every_family_is_pruned_to_the_exact_count(family: str, method: str, pattern: str) -> None:
    model = causal(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsity = 0.5 if pattern == "Unstructured" else None
    report = gossamer.prune(model, method, pattern, sparsity=sparsity, data=ids(), lanes=2)
    pruned = {row["name"] for row in report.weights}
    assert len(pruned) == 2 * CAUSAL[family][2]
    for name, tensor in model.state_dict().items():
        if name in pruned:
            assert int((tensor == 0).sum()) * 2 == tensor.numel(), name
        else:
            assert torch.equal(tensor, before[name]), f"{name} is no target and was changed"
    assert model(ids()).logits.isfinite().all()


@pytest.mark.parametrize("family", CAUSAL)
def test_head_embeddings_norms_and_routers_are_no_targets(family: str) -> None:
    model = causal(family)
    names = [target.name for target in targets(model)]
    assert not [
        n for n in names if any(word in n for word in ("embed", "lm_head", "norm", "ln_", "gate.weight", "router", "wte"))
    ]
    assert {target.block for target in targets(model)} == {0, 1}
    assert len(blocks_of(model)[1]) == 2


@pytest.mark.parametrize("family", ["gpt2"])
def test_conv1d_groups_run_along_its_inputs_which_are_stored_first(family: str) -> None:
    model = causal(family)
    gossamer.prune(model, "Wanda", "2:4", data=ids())
    weight = model.transformer.h[0].mlp.c_fc.weight.detach()  # stored (in, out)
    assert (weight.T.unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all()
    assert not (weight.unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_half_precision_models_keep_their_dtype(family: str, dtype: torch.dtype) -> None:
    model = causal(family, dtype)
    report = gossamer.prune(model, "SparseGPT", "2:4", data=ids())
    assert report.totals["sparsity"] == 0.5
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_tied_weights_stay_tied() -> None:
    model = causal("llama", tie_word_embeddings=True)
    gossamer.prune(model, "Wanda", "2:4", data=ids())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.count_nonzero() == model.lm_head.weight.numel()


@pytest.mark.parametrize("method", ["Magnitude", "Random"])
def test_encoders_take_the_data_free_scores(method: str) -> None:
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    for model in (
        BertForMaskedLM(BertConfig(**sizes, vocab_size=64)),
        ViTForImageClassification(ViTConfig(**sizes, image_size=32)),
    ):
        report = gossamer.prune(model, method, "Unstructured", sparsity=0.75)
        assert report.totals["weights"] == 12
        assert report.totals["sparsity"] == 0.75


def test_an_encoder_can_be_calibrated_with_its_own_inputs() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32)).eval()
    report = gossamer.prune(model, "Wanda", "2:4", data=[{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(2)])
    assert report.totals["sparsity"] == 0.5
    assert report.weights[0]["tokens"] == 4 * 5  # four images of four patches and the class token
