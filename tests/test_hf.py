"""Packed checkpoints in plain transformers: nothing of ours is called but by the import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import gossamer
import gossamer.hf
from gossamer.core.errors import GossamerError
from gossamer.models import quiet
from gossamer.sites._packed import checksum, opened
from gossamer.sites._packed_write import sparse_layers
from tests.sites.families import causal, ids


@pytest.fixture(autouse=True)
def _silent() -> Any:
    with quiet():
        yield


def saved(folder: Path, family: str = "llama", **how: Any) -> tuple[Any, Path]:
    model = causal(family, **how)
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    gossamer.save(model, folder / "packed", packed=True)
    return model, folder / "packed"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_plain_from_pretrained_and_a_second_round(family: str, tmp_path: Path) -> None:
    model, path = saved(tmp_path, family)
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    assert sparse_layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    assert opened(tmp_path / "again")[0] == opened(path)[0]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded), rtol=0, atol=0)


def test_generation_and_pipelines(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model, path = saved(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(1, 4)}
    assert torch.equal(loaded.generate(ids(1, 4), **how), model.generate(ids(1, 4), **how))
    tiny_tokenizer.save_pretrained(path)
    write = pipeline("text-generation", model=str(path), device="cpu")
    assert sparse_layers(write.model)
    assert write("The spider", max_new_tokens=4, do_sample=False, return_full_text=True)[0]["generated_text"].startswith("The")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    _, path = saved(tmp_path, tie_word_embeddings=True)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_stay_dense(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "mixtral")
    experts = [name for name in load_file(path / "model.safetensors") if "experts" in name]
    assert experts
    assert all(name.endswith(".weight") for name in experts)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: Any, tmp_path: Path) -> None:
    _, path = saved(tmp_path, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    assert {layer.values.dtype for layer in sparse_layers(loaded).values()} == {wanted}
    loaded.save_pretrained(tmp_path / "again")
    assert {weight.dtype for weight in opened(tmp_path / "again")[0].weights.values()} == {wanted}
    assert gossamer.load(tmp_path / "again").dtype == wanted


def test_a_dtype_that_no_format_has_is_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    with pytest.raises(GossamerError, match=r"up_proj|_proj.*values must be .* bfloat16 or float16 or float32, not .* float64"):
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def test_device_maps(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(path, device_map="auto")), logits(model))
    places: dict[str, Any] = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu"
    )
    places["model.layers.1"] = "disk"  # its buffers stay in memory, unless they are asked to go too
    offloaded = AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path / "off")
    torch.testing.assert_close(logits(offloaded), logits(model))
    with pytest.raises(GossamerError, match="was not loaded; its buffers cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(path, device_map=places, offload_folder=tmp_path / "off", offload_buffers=True)
    with pytest.raises(GossamerError, match=r"is not in memory \(offloaded\?\): load the model whole to save it packed"):
        gossamer.save(offloaded, tmp_path / "again", packed=True)


def test_other_heads_and_the_base_model(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    base = AutoModel.from_pretrained(path)
    torch.testing.assert_close(base(ids()).last_hidden_state, model.model(ids()).last_hidden_state, rtol=1e-4, atol=1e-4)
    base.save_pretrained(tmp_path / "base")
    assert len(sparse_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=True))) == 14
    assert len(sparse_layers(AutoModelForSequenceClassification.from_pretrained(path))) == 14


def test_unpacked_and_saved_it_is_ordinary(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    gossamer.unpack(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("forged", [False, True])
def test_what_is_not_sound_is_no_model(forged: bool, tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    held, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    name = "model.layers.1.mlp.down_proj.bits"
    held[name][3] ^= 1
    if forged:
        config["quantization_config"]["crc32"][name] = checksum(held[name])
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GossamerError, match="the packed weight's mask keeps" if forged else "is damaged"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_missing_dense_weight_is_no_random_one(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    held = load_file(path / "model.safetensors")
    del held["model.embed_tokens.weight"]
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GossamerError, match=r"lacks model\.embed_tokens\.weight"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_dense_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 96}))
    with pytest.raises((GossamerError, RuntimeError), match=r"(?i)embed_tokens|mismatch"):
        AutoModelForCausalLM.from_pretrained(path)


def test_dense_checkpoints_are_not_packed_while_they_are_loaded(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    packed, _ = opened(path)
    gossamer.unpack_checkpoint(path, tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=gossamer.hf.GossamerConfig(**packed.to_json())
        )


def test_nothing_is_registered_before_the_import() -> None:
    code = """if True:
        import gossamer
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
        assert 'gossamer' not in known
        before = set(known)
        import gossamer.hf
        assert set(known) - before == {'gossamer'}
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
