"""Packed checkpoints: what is in the files, how small they are, what they load and unpack to, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.models import INDEX, is_packed
from gossamer.sites import _packed_write
from gossamer.sites._packed import checksum, opened
from gossamer.sites._packed_write import sparse_layers
from tests.sites.families import CAUSAL, causal, ids

UP = "model.layers.0.mlp.up_proj"


def pruned(family: str = "llama", sparsity: float = 0.6, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    model = causal(family, dtype, **overrides)
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=sparsity)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def entry(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed tiny Llama in a directory of the test's own."""
    gossamer.save(pruned(), tmp_path / "packed", packed=True)
    return tmp_path / "packed"


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_loads_packed_and_unpacks_to_the_bit(family: str, tmp_path: Path) -> None:
    model = pruned(family)
    gossamer.save(model, tmp_path / "dense")
    gossamer.save(model, tmp_path / "packed", packed=True)
    loaded = gossamer.load(tmp_path / "packed")
    assert len(sparse_layers(loaded)) == 2 * CAUSAL[family][2] - (4 if "mix" in family or "moe" in family else 0)  # not experts
    assert not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=0.1, atol=0.05)
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert same_bits(tensors(tmp_path / "unpacked"), tensors(tmp_path / "dense"))
    for file in ("config.json", "generation_config.json", "sparsity.json"):
        assert json.loads((tmp_path / "unpacked" / file).read_text()) == json.loads((tmp_path / "dense" / file).read_text())
    gossamer.save(loaded, tmp_path / "again", packed=True)
    assert entry(tmp_path / "again") == entry(tmp_path / "packed")
    assert same_bits(tensors(tmp_path / "again"), tensors(tmp_path / "packed"))


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    gossamer.save(model, tmp_path / "out", packed=True)
    assert same_bits(model.state_dict(), before)
    assert model.config.to_dict() == config
    assert not sparse_layers(model)


def test_transformers_alone_stops_instead_of_filling_weights_at_random(packed: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(packed)!r}); print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "mismatch" in (done.stdout + done.stderr).lower()
    code = f"import gossamer.hf; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "loaded" in done.stdout, done.stderr


def test_a_checksum_is_of_dtype_shape_and_bytes() -> None:
    import zlib

    assert checksum(torch.tensor([[1.0, -0.0]])) == zlib.crc32(b"float32 1x2" + bytes.fromhex("0000803f00000080"))


def test_what_is_in_the_files(packed: Path) -> None:
    held, said = tensors(packed), entry(packed)
    assert {k.rpartition(".")[2] for k in held if k.startswith(UP)} == {"values", "bits", "weight"}
    assert held[f"{UP}.weight"].shape == (1,)
    assert said["quant_method"] == "gossamer"
    assert said["version"] == 2
    assert said["weights"][UP] == {"format": "Bitmask", "shape": [64, 32], "dtype": "bfloat16"}
    assert said["crc32"] == {name: checksum(tensor) for name, tensor in held.items()}
    assert "sparsity_config" not in (packed / "config.json").read_text()
    assert is_packed(packed)
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("format", "pattern", "said"),
    [
        ("Bitmask", None, {"format": "Bitmask"}),
        ("NM", "2:4", {"format": "NM", "n": 2, "m": 4}),
        ("Block", "4x1", {"format": "Block", "h": 4, "w": 1}),
        ("Sliced", None, {"format": "Bitmask"}),  # for running only
        ("Tiled", None, {"format": "Bitmask"}),
    ],
)
def test_packed_layers_are_written_as_they_are(format: str, pattern: str | None, said: dict[str, Any], tmp_path: Path) -> None:
    model = causal("gpt2", torch.bfloat16)  # with biases, stored (in, out)
    gossamer.prune(model, "Magnitude", pattern or "Unstructured", sparsity=None if format == "NM" else 0.5)
    gossamer.save(model, tmp_path / "dense")
    gossamer.pack(model, format, pattern=pattern)
    gossamer.save(model, tmp_path / "packed", packed=True)
    name = "transformer.h.0.mlp.c_fc"
    assert entry(tmp_path / "packed")["weights"][name] == {"shape": [128, 32], "dtype": "bfloat16", "transposed": True, **said}
    loaded = gossamer.load(tmp_path / "packed")
    assert type(loaded.get_submodule(name).packed).__name__ == said["format"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits, rtol=0.1, atol=0.05)
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert same_bits(tensors(tmp_path / "unpacked"), tensors(tmp_path / "dense"))


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.58), (0.7, 0.40), (0.9, 0.22)])
def test_how_small_a_file_is(sparsity: float, most: float, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = pruned(sparsity=sparsity, **sizes)
    gossamer.save(model, tmp_path / "out", packed=True)
    weights = {name: p.nbytes for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    rest = sum(p.nbytes for name, p in model.named_parameters() if name not in weights)
    assert ((tmp_path / "out" / "model.safetensors").stat().st_size - rest) / sum(weights.values()) <= most


def test_a_weight_that_would_not_shrink_stays_dense(tmp_path: Path) -> None:
    model = pruned()
    weight = model.get_submodule(UP).weight.data
    weight.fill_(1.0)
    weight[:, 0] = 0.0  # 1 of 32, and a bit of 16 is 1 of 16
    gossamer.save(model, tmp_path / "out", packed=True)
    assert f"{UP}.weight" in tensors(tmp_path / "out")
    assert len(entry(tmp_path / "out")["weights"]) == 13
    assert isinstance(gossamer.load(tmp_path / "out").get_submodule(UP), torch.nn.Linear)


def test_shards_tokenizer_and_other_files(tmp_path: Path, monkeypatch: Any, tiny_tokenizer: Any) -> None:
    model = pruned(tie_word_embeddings=True)
    gossamer.save(model, tmp_path / "dense")
    monkeypatch.setattr(_packed_write, "SHARD_BYTES", 12_000)
    gossamer.save(model, tmp_path / "packed", packed=True, tokenizer=tiny_tokenizer)
    (tmp_path / "packed" / "notes.md").write_text("kept")
    (tmp_path / "packed" / "old.bin").write_text("a pickle")
    shards = sorted(tmp_path.glob("packed/*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 1
    assert all(shard.stat().st_size < 16_000 for shard in shards)
    loaded = gossamer.load(tmp_path / "packed")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    names = {file.name for file in (tmp_path / "unpacked").iterdir()}
    assert {"config.json", "tokenizer.json", "notes.md", "sparsity.json", INDEX} <= names
    assert "old.bin" not in names
    assert same_bits(tensors(tmp_path / "unpacked"), tensors(tmp_path / "dense"))
    assert gossamer.load(tmp_path / "unpacked").lm_head.weight.shape == (128, 32)


def test_names_that_files_give_differently(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4))
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    gossamer.save(model, tmp_path / "dense")
    gossamer.save(model, tmp_path / "packed", packed=True)
    assert any("module" in weight for weight in entry(tmp_path / "packed")["weights"].values())
    assert len(sparse_layers(gossamer.load(tmp_path / "packed"))) == 12
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert same_bits(tensors(tmp_path / "unpacked"), tensors(tmp_path / "dense"))


def test_nan_and_infinity_come_back_and_zeros_without_their_sign(tmp_path: Path) -> None:
    model = pruned(dtype=torch.float32)
    weight = model.get_submodule(UP).weight.data
    weight[0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])
    gossamer.save(model, tmp_path / "packed", packed=True)
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    weight[0, 0] = 0.0
    assert torch.equal(tensors(tmp_path / "dense")[f"{UP}.weight"].view(torch.int32), weight.view(torch.int32))


class Largest(TorchDispatchMode):
    """Notes every float tensor of a shape that lies in memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.seen = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        found = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.seen += sum(t.shape == self.shape and not t.is_meta and t.is_floating_point() for t in found)
        return out


def test_loading_never_holds_the_dense_weight(packed: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the mode sees one thread
    with Largest((64, 32)) as noted:
        gossamer.load(packed)
    assert not noted.seen
    with Largest((128, 32)) as noted:
        gossamer.load(packed)
    assert noted.seen  # the embeddings are dense


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: causal("llama"),
            "there is nothing to pack: no weight has zeros enough to take fewer bytes packed; prune it first",
        ),
        (lambda: pruned().double(), "q_proj.weight: cannot pack float64: supported are bfloat16, float16, float32"),
    ],
)
def test_what_cannot_be_packed_is_said_and_nothing_is_written(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match=words):
        gossamer.save(make(), tmp_path / "out", packed=True)
    assert not list(tmp_path.iterdir())


def test_packed_models_are_not_saved_dense_nor_pruned(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="the model holds packed weights: save it with packed=True, or make it dense"):
        gossamer.save(gossamer.load(packed), tmp_path / "out")
    with pytest.raises(GossamerError, match=r"is packed: gossamer unpack .* --out DENSE makes it dense again"):
        gossamer.prune_checkpoint(packed, tmp_path / "out", "Magnitude", "2:4")
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def damage(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any], *, forge: bool = False) -> Callable[[Path], None]:
    """Return a function that changes a directory's tensors and its config's entry, with new checksums where asked."""

    def applied(folder: Path) -> None:
        held, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        change(held, config["quantization_config"])
        if forge:
            config["quantization_config"]["crc32"] = {name: checksum(tensor) for name, tensor in held.items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))

    return applied


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(held: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    held[f"{UP}.values"].view(torch.int16)[7] ^= 1


def more_bits(held: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    held[f"{UP}.bits"][0] = 255


def swap(held: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    other = "model.layers.0.mlp.gate_proj.bits"
    held[f"{UP}.bits"], held[other] = held[other].clone(), held[f"{UP}.bits"].clone()


def shorter(held: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    held[f"{UP}.values"] = held[f"{UP}.values"][:-1].clone()


def reinterpret(held: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    held["model.norm.weight"] = held["model.norm.weight"].view(torch.float16)  # the same bytes


def reshape(held: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    held["lm_head.weight"] = held["lm_head.weight"].view(32, 128)


def weight(**more: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]:
    return lambda held, said: said["weights"][UP].update(more)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, "model.safetensors is truncated or corrupt"),
    "flipped": (damage(flip), f"{UP}.values is damaged: it has another checksum than its config says"),
    "swapped": (damage(swap), "mlp.* is damaged: it has another checksum"),
    "dense dtype": (damage(reinterpret), r"model\.norm\.weight is damaged"),
    "dense shape": (damage(reshape), r"lm_head\.weight is damaged"),
    "population": (damage(more_bits, forge=True), r"the packed weight's mask keeps \d+ entries, but there are \d+ values"),
    "length": (damage(shorter, forge=True), r"mask keeps \d+ entries, but there are \d+ values"),
    "missing": (damage(lambda held, said: held.pop(f"{UP}.bits")), f"lacks {UP}.bits"),
    "extra": (damage(lambda held, said: held.update(x=torch.ones(1))), "holds, and its config does not list, x"),
    "unlisted": (
        damage(lambda held, said: said["weights"].pop(UP)),
        f"the config has no packed weight {UP}, and the files hold",
    ),
    "version": (damage(lambda held, said: said.update(version=1)), "has the version 1; this gossamer reads version 2"),
    "format": (damage(weight(format="Zip")), "unknown format 'Zip'; known: Bitmask, Block, Grouped, NM"),
    "another format": (damage(weight(format="NM", n=2, m=4)), f"the packed weight {UP} has no use for the tensor bits"),
    "shape": (damage(weight(shape=[64, 24])), rf"the packed weight {UP} is \(64, 24\) in its config, and \(64, 32\) in Llama"),
    "no shape": (damage(weight(shape=[64])), r"has the shape \[64\], not \(out, in\)"),
    "dtype": (damage(weight(dtype="float32")), f"{UP}.values is torch.bfloat16, and its config says torch.float32"),
    "int8": (damage(weight(dtype="int8")), "has the dtype 'int8'; known: bfloat16, float16, float32"),
    "key": (damage(weight(scale=1)), "has the unknown key 'scale'"),
    "no weights": (damage(lambda held, said: said.pop("weights")), "has no weights"),
    "transposed": (damage(weight(transposed=True)), r"is \(32, 64\) in its config"),
    "no such linear": (
        damage(weight(module="model.norm")),
        "the config packs model.norm, which is no linear of LlamaForCausalLM",
    ),
    "method": (damage(lambda held, said: said.update(quant_method="zip")), "weights have another shape than its config says"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_sound_is_refused_in_one_line(case: str, packed: Path) -> None:
    spoil, words = BROKEN[case]
    spoil(packed)
    with pytest.raises(GossamerError, match=words) as caught:
        gossamer.load(packed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["truncated", "flipped", "population", "missing", "version", "dtype", "method"])
def test_unpacking_refuses_the_same(case: str, packed: Path, tmp_path: Path) -> None:
    BROKEN[case][0](packed)
    with pytest.raises(GossamerError):
        gossamer.unpack_checkpoint(packed, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_a_model_of_fewer_blocks_than_the_files_is_refused(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(GossamerError, match=r"the config packs model\.layers\.1.*, which is no linear of LlamaForCausalLM"):
        gossamer.load(packed)


def test_opening_builds_no_model(packed: Path) -> None:
    said, files = opened(packed)
    found = said.weights[UP].read(files.of(UP, said.weights[UP]))
    assert found.shape == (64, 32)


def run(monkeypatch: Any, *arguments: object) -> Any:
    """Run the command line in this process; return its exit status."""
    from gossamer import cli

    monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command(packed: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "unpack", packed, "--out", tmp_path / "dense") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'dense'}\n"
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    for source, out, words in ((tmp_path / "dense", "x", "is not packed"), (packed, "dense", "is not empty")):
        assert run(monkeypatch, "unpack", source, "--out", tmp_path / out) == 2
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1


def test_evaluation_reads_packed_directories(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: Any, capsys: Any) -> None:
    model = pruned(max_position_embeddings=128)
    gossamer.save(model, tmp_path / "packed", packed=True, tokenizer=tiny_tokenizer)
    assert run(monkeypatch, "eval", tmp_path / "packed", "--seqlen", 16, "--windows", 2, "--quiet") == 0
    assert capsys.readouterr().out.startswith("perplexity ")
