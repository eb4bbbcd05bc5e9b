"""A method that factorizes: products in the place of linears, saved with their factors or multiplied out, streamed, refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.sites import _run
from gossamer.sites._packed import checksum
from gossamer.sites._packed_write import sparse_layers
from tests.sites.families import causal, ids

METHOD = "ARMOR(block=8, steps=4)"
UP = "model.layers.0.mlp.up_proj"


def factorized(family: str = "llama", dtype: torch.dtype = torch.float32, **how: Any) -> tuple[Any, Any]:
    model = causal(family, dtype)
    return model, gossamer.prune(model, METHOD, "2:4", data=ids(), **how)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_report_tells_the_cores_zeros_and_the_bytes() -> None:
    model, report = factorized()
    assert len(sparse_layers(model)) == len(report.weights) == 14
    row = next(r for r in report.weights if r["name"] == f"{UP}.weight")
    assert {k: row[k] for k in ("shape", "sparsity", "nnz", "format")} == {
        "shape": [64, 32], "sparsity": 0.5, "nnz": 1024, "format": "Wrapped"
    }  # fmt: skip
    assert row["bytes"] == 4 * (8 * 8 * 8 + 4 * 8 * 8 + 1024) + 64 * 16 * 2 // 8
    assert row["dense_bytes"] == 4 * 64 * 32
    assert 0 < row["proxy_loss"] < 0.9
    assert report.totals["sparsity"] == 0.5
    assert report.totals["bytes_bitmask"] == sum(r["bytes"] for r in report.weights)
    assert report.model["bytes"] == sum(p.nbytes for p in causal("llama").parameters()), "the model before"


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: stored (in, out), with biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_packed_it_comes_back_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, report = factorized(family, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gossamer.save(model, tmp_path / "packed", packed=True, report=report)
    loaded = gossamer.load(tmp_path / "packed")
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")  # transformers' own
    assert torch.equal(logits(gossamer.load(tmp_path / "again")), logits(model))
    half = gossamer.load(tmp_path / "packed", dtype=torch.float16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.float16, torch.uint8}
    torch.testing.assert_close(logits(half).float(), logits(model).float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_dense_it_is_multiplied_out_for_plain_transformers(family: str, tmp_path: Path) -> None:
    model, report = factorized(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gossamer.save(model, tmp_path / "dense", report=report)
    assert sparse_layers(model), "the model is as it was"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.save(logits(model), tmp_path / "wanted.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'dense')!r}); wanted = torch.load({str(tmp_path / 'wanted.pt')!r})\n"
        "ids = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))\n"
        "torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)\n"
        "print('gossamer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    said = read(tmp_path / "dense" / "sparsity.json")["weights"]
    assert said.keys() == {row["name"] for row in report.weights}
    assert {row["sparsity"] for row in said.values()} == {0.0}, "a product has no zeros"
    assert "quantization_config" not in read(tmp_path / "dense" / "config.json")
    assert {p.suffix for p in (tmp_path / "dense").iterdir()} == {".json", ".safetensors"}
    gossamer.save(model, tmp_path / "packed", packed=True)
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    there, wanted = tensors(tmp_path / "unpacked"), tensors(tmp_path / "dense")
    assert there.keys() == wanted.keys()
    assert all(torch.equal(there[name], wanted[name]) for name in there)
    assert read(tmp_path / "unpacked" / "sparsity.json")["weights"] == said
    close = logits(model)
    assert gossamer.unpack(model) == len(report.weights)
    torch.testing.assert_close(logits(model), close, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == causal(family).state_dict().keys()


def test_some_linears_only(tmp_path: Path) -> None:
    model = causal("llama")
    gossamer.prune(model, METHOD, "2:4", data=ids(), targets="*.up_proj")
    gossamer.save(model, tmp_path / "some", packed=True)
    again = gossamer.load(tmp_path / "some")
    assert sparse_layers(again).keys() == {UP, UP.replace("0", "1")}
    torch.testing.assert_close(logits(again), logits(model))
    gossamer.save(model, tmp_path / "dense")
    torch.testing.assert_close(logits(gossamer.load(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-4)


class Stopped(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.fixture
def source(tiny_dir: Path) -> Path:
    return tiny_dir


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(
        "The spider spins a thin thread; the thread holds, for gossamer is light and strong. (yes!)\n" * 40
    )
    return tmp_path / "text.txt"


def stream(source: Path, out: Path, text: Path, **how: Any) -> Any:
    return gossamer.prune_checkpoint(source, out, METHOD, "2:4", data=text, seqlen=16, samples=8, progress=False, **how)


def test_streamed_it_is_a_packed_checkpoint_with_the_bits_of_memory(source: Path, text: Path, tmp_path: Path) -> None:
    report = stream(source, tmp_path / "out", text)
    loaded, model = gossamer.load(tmp_path / "out"), gossamer.load(source)
    wanted = gossamer.prune(model, METHOD, "2:4", data=text, seqlen=16, samples=8)
    assert sparse_layers(loaded).keys() == sparse_layers(model).keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert [{**r, "seconds": 0} for r in report.weights] == [{**r, "seconds": 0} for r in wanted.weights]
    said = read(tmp_path / "out" / "config.json")["quantization_config"]
    assert said["weights"][UP] == {"format": "Wrapped", "shape": [64, 32], "dtype": "float32", "n": 2, "m": 4}
    assert said["crc32"] == {name: checksum(tensor) for name, tensor in tensors(tmp_path / "out").items()}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    gossamer.save(model, tmp_path / "saved", packed=True)
    assert tensors(tmp_path / "saved").keys() == said["crc32"].keys()


def test_a_stopped_run_goes_on_to_the_same_bits(source: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    stream(source, tmp_path / "whole", text)
    finish, calls = _run.Run.finish_block, []

    def stop(self: Any, position: int, *rest: Any) -> None:
        calls.append(position)
        finish(self, position, *rest)
        if len(calls) == 1:
            raise Stopped

    monkeypatch.setattr(_run.Run, "finish_block", stop)
    with pytest.raises(Stopped):
        stream(source, tmp_path / "out", text)
    stream(source, tmp_path / "out", text)
    assert calls == [0, 1]
    there, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert there.keys() == wanted.keys()
    assert all(torch.equal(there[name], wanted[name]) for name in there)
    assert read(tmp_path / "out" / "config.json") == read(tmp_path / "whole" / "config.json")


def test_the_command_line_prunes_measures_and_generates(
    source: Path, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from gossamer import cli

    def run(*words: object) -> tuple[Any, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    short = ("--data", text, "--seqlen", 16)
    status, out, _ = run(
        "prune", source, "--method", METHOD, "--pattern", "2:4", *short, "--samples", 8, "--out", tmp_path / "out"
    )
    assert status == 0
    assert "sparsity 0.5000" in out
    assert run("eval", tmp_path / "out", *short, "--json", tmp_path / "found.json")[0] == 0
    assert run("unpack", tmp_path / "out", "--out", tmp_path / "dense")[0] == 0
    assert run("eval", tmp_path / "dense", *short, "--json", tmp_path / "dense.json")[0] == 0
    found, wanted = read(tmp_path / "found.json")["perplexity"], read(tmp_path / "dense.json")["perplexity"]
    assert found == pytest.approx(wanted, rel=1e-3)
    assert run("generate", tmp_path / "out", "--prompt", "The spider", "--tokens", 4)[0] == 0
    status, _, err = run("prune", tmp_path / "out", "--method", METHOD, "--pattern", "2:4", *short, "--out", tmp_path / "twice")
    assert (status, err.count("\n")) == (2, 1)
    assert "is packed: gossamer unpack" in err


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "pattern": ("ARMOR(block=8)", {"pattern": "Unstructured", "sparsity": 0.5}, "defined for the patterns NM, not for Unstr"),
    "sparsity": ("ARMOR(block=8)", {"sparsity": 0.7}, "sparsity"),
    "sizes": (
        "ARMOR",
        {},
        r"ARMOR\(block=64\) wants sizes that its block divides; model.layers.0.self_attn.q_proj.weight is 32x32",
    ),
    "groups": ("ARMOR(block=6)", {}, r"ARMOR\(block=6\) wants a block that the groups of 2:4 divide"),
    "head": ("ARMOR(block=8)", {"targets": "lm_head"}, "lm_head.weight stands outside the blocks"),
    "no data": ("ARMOR(block=8)", {"data": None}, r"ARMOR\(block=8\) needs calibration data"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_and_changes_nothing(case: str, source: Path, text: Path, tmp_path: Path) -> None:
    method, how, words = BAD[case]
    how = {"pattern": "2:4", "data": text, **how}
    model = gossamer.load(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GossamerError, match=words) as caught:
        gossamer.prune(model, method, how.pop("pattern"), seqlen=16, samples=8, **how)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    how = {"pattern": "2:4", "data": text, **BAD[case][1]}
    with pytest.raises(GossamerError, match=words):
        gossamer.prune_checkpoint(source, tmp_path / "out", method, how.pop("pattern"), seqlen=16, samples=8, **how)
    assert not (tmp_path / "out").exists()


def test_a_comparison_takes_it_but_not_timed(source: Path, text: Path, tmp_path: Path) -> None:
    from gossamer.compare import compare

    how: dict[str, Any] = {"data": str(text), "seqlen": 16, "samples": 8, "windows": 4, "progress": False}
    (timed,) = compare(source, [METHOD], ["2:4"], [], tmp_path / "timed", speed=True, **how)["runs"]
    assert timed["speed"] is None
    found = compare(source, ["Magnitude", METHOD], ["2:4"], [], tmp_path / "out", keep_models=True, **how)
    plain, ours = found["runs"]
    assert plain["totals"]["sparsity"] == ours["totals"]["sparsity"] == 0.5
    assert plain["totals"]["bytes_bitmask"] < ours["totals"]["bytes_bitmask"]
    assert ours["evaluation"]["perplexity"] > 0


def test_stacked_experts_are_refused() -> None:
    with pytest.raises(GossamerError, match="is a stack of experts: leave it out of targets="):
        factorized("mixtral")
    model, report = factorized("mixtral", targets="*.self_attn.*")
    assert len(report.weights) == len(sparse_layers(model)) == 8


def forged(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def applied(folder: Path) -> None:
        held, config = load_file(folder / "model.safetensors"), read(folder / "config.json")
        change(held)
        config["quantization_config"]["crc32"] = {name: checksum(tensor) for name, tensor in held.items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))

    return applied


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (forged(lambda held: held.pop(f"{UP}.left")), f"the packed weight {UP} lacks the tensor left"),
        (forged(lambda held: held.update({f"{UP}.left": torch.ones(4, 8, 8)})), "left is 4 blocks of 8x8, and no 64x64"),
        (forged(lambda held: held.update({f"{UP}.right": torch.ones(2, 8, 8)})), "right is 2 blocks of 8x8, and no 32x32"),
    ],
)
def test_damaged_factors_are_not_loaded(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    gossamer.save(factorized()[0], tmp_path / "packed", packed=True)
    damage(tmp_path / "packed")
    with pytest.raises(GossamerError, match=words):
        gossamer.load(tmp_path / "packed")
