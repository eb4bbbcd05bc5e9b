"""Structure removed from any family: the same outputs as with zeros in its place, and a model that loads again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import gossamer
import gossamer.hf
from gossamer.core.errors import GossamerError
from gossamer.core.stats import Stats
from gossamer.models import quiet
from gossamer.sites._coupling import couplings
from gossamer.sites._walk import blocks_of
from tests.sites.families import CAUSAL, causal, ids
from tests.structures.methods import Drop, KeepChannels, KeepHeads

WITH_CHANNELS = [name for name in CAUSAL if name not in ("mixtral", "qwen3_moe")]
WITH_HEADS = ["llama", "mistral", "qwen3", "gemma3", "phi", "opt", "gpt2", "mixtral", "qwen3_moe"]
UNEVEN = [("channels", family) for family in WITH_CHANNELS] + [("heads", family) for family in WITH_HEADS]


@pytest.fixture(autouse=True)
def _silent() -> Any:
    with quiet():
        yield


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


def uneven(family: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a model shrunk to other counts in each block, and the whole one with zeros where members are gone."""
    model, zeroed = causal(family, dtype), causal(family, dtype)
    found = couplings(zeroed, blocks_of(zeroed)[1], kind)
    left = (found[0].count - 1, found[1].count // 2 if found[1].count > 2 else 2)
    for coupling, n in zip(found, left, strict=True):
        group = coupling.group()
        group.out[:, : (group.count - n) * group.width] = 0
    report = gossamer.shrink(model, (KeepChannels if kind == "channels" else KeepHeads)(left=left), sparsity=0.5, data=ids())
    assert report.structure["widths"] == {kind: list(left)}
    assert not report.structure["plain"]
    return model, zeroed


@pytest.mark.parametrize(("kind", "family"), UNEVEN)
def test_without_a_member_is_as_with_zeros_in_its_columns(kind: str, family: str) -> None:
    model, zeroed = uneven(family, kind)
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in zeroed.parameters())


@pytest.mark.parametrize(("kind", "family"), UNEVEN)
def test_a_group_counts_its_parameters(kind: str, family: str) -> None:
    model = causal(family)
    before = sum(p.numel() for p in model.parameters())
    groups = [c.group() for c in couplings(model, blocks_of(model)[1], kind)]
    for coupling in couplings(model, blocks_of(model)[1], kind):
        coupling.keep(torch.arange(1, coupling.count))
    assert before - sum(p.numel() for p in model.parameters()) == sum(group.size for group in groups)


@pytest.mark.parametrize(("kind", "family"), UNEVEN)
def test_other_widths_in_each_block_are_saved_loaded_and_saved_again(kind: str, family: str, tmp_path: Path) -> None:
    model, _ = uneven(family, kind)
    gossamer.save(model, tmp_path / "a")
    loaded = gossamer.load(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    plain.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == json.loads((tmp_path / "a" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))


@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_generation_with_other_heads_in_each_block(family: str, cache: str | None, tmp_path: Path) -> None:
    model, _ = uneven(family, "heads")
    gossamer.save(model, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokens = ids(2, 5)
    for _ in range(6):  # greedily, the whole text again for each token
        with torch.no_grad():
            tokens = torch.cat([tokens, loaded(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    how |= {"attention_mask": torch.ones(2, 5, dtype=torch.long), "eos_token_id": None}
    assert torch.equal(loaded.generate(ids(2, 5), **how, cache_implementation=cache), tokens)


def test_a_static_cache_of_ones_own(tmp_path: Path) -> None:
    model, _ = uneven("llama", "heads")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        first = model(ids(1, 8), past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(first, model(ids(1, 8), use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 2]


@pytest.mark.parametrize(("kind", "left"), [("channels", (40, 40)), ("heads", (1, 1))])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_even_widths_are_an_ordinary_checkpoint(kind: str, left: tuple[int, ...], family: str, tmp_path: Path) -> None:
    model = causal(family)
    method = (KeepChannels if kind == "channels" else KeepHeads)(left=left)
    report = gossamer.shrink(model, method, sparsity=0.5, data=ids())
    assert report.structure["plain"]
    gossamer.save(model, tmp_path / "a")
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    got = in_plain_transformers(tmp_path / "a", tmp_path / "got.pt")
    assert got.returncode == 0, got.stderr
    torch.testing.assert_close(torch.load(tmp_path / "got.pt"), logits(model), rtol=1e-4, atol=1e-5)


def test_even_heads_without_a_word_for_them_are_listed(tmp_path: Path) -> None:
    model = causal("gpt2")  # its head_dim is hidden / heads: three heads of the old size cannot be said, nor two
    for left in ((3, 3), (2, 2)):
        report = gossamer.shrink(model, KeepHeads(left=left), sparsity=0.5, data=ids())
        assert report.structure["widths"] == {"heads": list(left)}
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(gossamer.load(tmp_path / "a")), logits(model))


@pytest.mark.parametrize("family", CAUSAL)
def test_fewer_blocks_are_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    model = causal(family)
    report = gossamer.shrink(model, Drop(blocks=(0,)), sparsity=0.5)
    assert report.structure["blocks"] == [2, 1]
    assert report.structure["plain"]
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()), logits(model))
    assert torch.equal(logits(gossamer.load(tmp_path / "a")), logits(model))
    model.generate(ids(1, 4), max_new_tokens=2, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, 4))


def test_kinds_of_blocks_go_with_them(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = causal("gemma3", num_hidden_layers=4, layer_types=types)
    gossamer.shrink(model, Drop(blocks=(0, 3)), sparsity=0.5)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    gossamer.save(model, tmp_path / "a")
    assert torch.equal(logits(gossamer.load(tmp_path / "a")), logits(model))


def test_blocks_that_cannot_move_are_refused() -> None:
    model = causal("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(GossamerError, match=r"no model that can be built: .*scaling"):
        gossamer.shrink(model, Drop(blocks=(0,)), sparsity=0.5)
    assert len(model.transformer.h) == model.config.n_layer == 2
    model = causal("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1])
    with pytest.raises(GossamerError, match="names blocks in a way that cannot be cut"):
        gossamer.shrink(model, Drop(blocks=(0,)), sparsity=0.5)


def test_one_after_the_other(tmp_path: Path) -> None:
    model = causal("llama", num_hidden_layers=4)
    gossamer.shrink(model, KeepChannels(left=(64, 48, 32, 16)), sparsity=0.5, data=ids())
    gossamer.shrink(model, KeepHeads(left=(1, 2, 1, 2)), sparsity=0.5, data=ids())
    report = gossamer.shrink(model, Drop(blocks=(1,)), sparsity=0.2)
    assert report.structure["widths"] == {"channels": [64, 32, 16], "heads": [1, 1, 2]}
    gossamer.save(model, tmp_path / "a")
    loaded = gossamer.load(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    report = gossamer.shrink(loaded, KeepChannels(left=(16, 16, 16)), sparsity=0.2, data=ids())
    report = gossamer.shrink(loaded, KeepHeads(left=(1, 1, 1)), sparsity=0.2, data=ids())
    assert report.structure["plain"]
    assert not hasattr(loaded.config, "quantization_config")


def test_a_shrunk_model_is_pruned_packed_and_unpacked(tmp_path: Path) -> None:
    model, _ = uneven("llama", "channels")
    gossamer.save(model, tmp_path / "a")
    gossamer.prune_checkpoint(tmp_path / "a", tmp_path / "pruned", "Magnitude", "Unstructured", sparsity=0.5)
    pruned = gossamer.load(tmp_path / "pruned")
    gossamer.save(pruned, tmp_path / "packed", packed=True)
    packed = gossamer.load(tmp_path / "packed")
    torch.testing.assert_close(logits(packed), logits(pruned), rtol=1e-4, atol=1e-5)
    packed.save_pretrained(tmp_path / "packed again")
    torch.testing.assert_close(logits(gossamer.load(tmp_path / "packed again")), logits(pruned), rtol=1e-4, atol=1e-5)
    gossamer.unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert torch.equal(logits(gossamer.load(tmp_path / "dense")), logits(pruned))
    gossamer.unpack(packed)
    gossamer.save(packed, tmp_path / "unpacked")
    assert torch.equal(logits(gossamer.load(tmp_path / "unpacked")), logits(pruned))


def test_it_trains_as_any_dense_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = uneven("llama", "channels")
    gossamer.save(model, tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    how = TrainingArguments(str(tmp_path / "t"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    Trainer(loaded, how, train_dataset=rows).train()
    loaded.eval().save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(gossamer.load(tmp_path / "trained")), logits(loaded))
    assert not torch.equal(logits(loaded), logits(model))
    loaded.half()  # a quantized model would refuse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model, zeroed = uneven("llama", "heads", dtype)
    torch.testing.assert_close(logits(model).float(), logits(zeroed).float(), rtol=5e-2, atol=5e-2)
    gossamer.save(model, tmp_path / "a")
    assert {p.dtype for p in gossamer.load(tmp_path / "a").parameters()} == {dtype}


def in_plain_transformers(path: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Load a directory in a process that knows nothing of us, and keep its logits."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(path)!r})\n"
        "ids = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))\n"
        f"torch.save(model(ids).logits.detach(), {str(to)!r})\n"
        "assert not any(name.startswith('gossamer') for name in sys.modules)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_plain_transformers_stops_at_widths_it_does_not_know(kind: str, tmp_path: Path) -> None:
    model, _ = uneven("llama", kind)
    gossamer.save(model, tmp_path / "a")
    done = in_plain_transformers(tmp_path / "a", tmp_path / "got.pt")
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr
    assert not (tmp_path / "got.pt").exists()


BAD = {
    "longer": ({"channels": [40, 40, 40]}, "lists 3 widths of channels, and the model has 2 blocks"),
    "wider": ({"channels": [40, 65]}, "lists 65 channels for block 1, and its sizes make 64"),
    "none": ({"channels": [40, 0]}, "no list of positive integers"),
    "no integer": ({"channels": [40, 1.5]}, "no list of positive integers"),
    "no list": ({"channels": 40}, "no list of positive integers"),
    "true": ({"channels": [True, 40]}, "no list of positive integers"),
    "unknown": ({"neurons": [40, 40]}, "unknown key 'neurons'; known: channels, heads, ranks.NAME"),
    "empty": ({}, "is no object of channels and heads"),
    "others": ({"channels": [40, 41]}, "does not fit its config"),
    "heads": ({"heads": [1, 1]}, "does not fit its config"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes_in_the_file_are_one_clear_line(case: str, tmp_path: Path) -> None:
    model, _ = uneven("llama", "channels")
    gossamer.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    widths, told = BAD[case]
    config["quantization_config"]["widths"] = widths
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GossamerError, match=told) as error:
        gossamer.load(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_the_calibrated_methods_leave_nothing_changed_where_they_refuse() -> None:
    model = causal("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GossamerError, match=r"one MLP whose channels can be removed .* block 0 has none; known by"):
        gossamer.shrink(model, "CFSP", sparsity=0.2, data=ids())
    with pytest.raises(GossamerError, match="needs calibration data"):
        gossamer.shrink(model, "Depth", sparsity=0.5)
    for sparsity in (0.0, 1.0, -0.5):
        with pytest.raises(GossamerError, match=r"in \(0, 1\)"):
            gossamer.shrink(model, "Depth", sparsity=sparsity, data=ids())
    with pytest.raises(GossamerError, match="unknown structure 'Dept'; did you mean Depth"):
        gossamer.shrink(model, "Dept", sparsity=0.5, data=ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["bloom", "falcon", "gpt_neox"])
def test_heads_that_the_table_does_not_know_are_refused(family: str) -> None:
    with pytest.raises(GossamerError, match="one attention whose heads can be removed"):
        gossamer.shrink(causal(family), KeepHeads(left=(1, 1)), sparsity=0.5, data=ids())


def test_a_model_that_reads_its_counts_elsewhere_is_refused_before_it_is_cut() -> None:
    model = causal("llama")
    attention = type(model.model.layers[0].self_attn)

    class Stubborn(attention):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            assert self.q_proj.out_features
            self.q_proj(hidden_states).view(*hidden_states.shape[:-1], self.config.num_attention_heads, self.head_dim)
            return super().forward(hidden_states, **kwargs)

    for block in model.model.layers:
        block.self_attn.__class__ = Stubborn
    with pytest.raises(GossamerError, match="does not work with fewer heads than its configuration says"):
        gossamer.shrink(model, KeepHeads(left=(1, 1)), sparsity=0.5, data=ids())
    assert model.model.layers[0].self_attn.q_proj.out_features == 32


def test_a_model_that_would_compute_something_else_is_refused() -> None:
    model = causal("llama")
    mlp = type(model.model.layers[0].mlp)

    class Mixed(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # the mean over channels couples what the table takes for free
            made = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(made - made.mean(-1, keepdim=True))

    for block in model.model.layers:
        block.mlp.__class__ = Mixed
    with pytest.raises(GossamerError, match=r"does not work with fewer channels .* its outputs are off by"):
        gossamer.shrink(model, KeepChannels(left=(32, 32)), sparsity=0.5, data=ids())


def test_the_same_windows_give_the_same_bits_and_the_mode_stays() -> None:
    runs = []
    for _ in range(2):
        model = causal("llama").train()
        gossamer.shrink(model, "CFSP(a=1000.0)", sparsity=0.2, data=ids())
        assert model.training
        runs.append(model.state_dict())
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = causal("llama", tie_word_embeddings=True)
    gossamer.shrink(model, KeepChannels(left=(32, 40)), sparsity=0.3, data=ids())
    gossamer.save(model, tmp_path / "a")
    loaded = gossamer.load(tmp_path / "a")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "method", ["Depth", "CFSP", "ZipLM", "SliceGPT", "AdaptPruner", "Tyr(rounds=1, generations=1)", "WeLore"]
)
def test_states_that_overflow_are_refused_unchanged(method: str) -> None:
    model = causal("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e5
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GossamerError, match="overflow" if method == "WeLore" else "hold NaN or infinities"):
        gossamer.shrink(model, method, sparsity=0.5 if method == "Depth" else 0.25, data=ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_configuration_inside_another_changes_where_the_modules_see_it(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": 128, "layer_types": ["full_attention"] * 3}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 28}
    config = Gemma3Config(text_config=text, vision_config={**sight, "patch_size": 14}, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    inner = model.model.language_model.config
    gossamer.shrink(model, Drop(blocks=(1,)), sparsity=0.3)
    assert inner.num_hidden_layers == model.config.text_config.num_hidden_layers == 2
    gossamer.shrink(model, KeepChannels(left=(40, 40)), sparsity=0.3, data=ids())
    assert inner.intermediate_size == 40
    model.save_pretrained(tmp_path / "a")
    again = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["AdaptPruner", "Tyr(rounds=1, generations=1)", "WeLore"])
def test_too_little_to_remove_is_an_error_and_changes_nothing(method: str) -> None:
    model = causal("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(GossamerError, match="nothing that it could remove"):
        gossamer.shrink(model, method, sparsity=1e-6, data=ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["AdaptPruner", "Tyr(rounds=1, generations=1)"])
def test_what_looks_at_the_next_token_wants_a_head_and_a_next_token(method: str) -> None:
    with pytest.raises(GossamerError, match="LlamaModel has no head"):
        gossamer.shrink(causal("llama").model, method, sparsity=0.2, data=ids())
    if method == "AdaptPruner":
        with pytest.raises(GossamerError, match="the next-token loss on a window of 1 tokens is nan"):
            gossamer.shrink(causal("llama"), method, sparsity=0.2, data=ids(4, 1))


@pytest.mark.parametrize("method", ["ZipLM", "Tyr(rounds=1, generations=1)"])
def test_matrices_are_those_of_one_block(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    factor, seen = Stats.inverse_factor, []

    def watched(self: Stats, damp: float) -> Any:
        found = factor(self, damp)
        gc.collect()
        seen.append(sum(type(thing) is Stats and thing.gram is not None for thing in gc.get_objects()))
        return found

    monkeypatch.setattr(Stats, "inverse_factor", watched)
    gossamer.shrink(causal("llama", num_hidden_layers=4), method, sparsity=0.3, data=ids())
    assert max(seen) <= 2  # heads and channels


@pytest.mark.parametrize("method", ["AdaptPruner", "ZipLM", "Tyr(rounds=1, generations=2)"])
def test_channels_stay_in_multiples_of_a_width_that_is_none(method: str) -> None:
    model = causal("llama", intermediate_size=100, num_hidden_layers=3)
    report = gossamer.shrink(model, method, sparsity=0.3, data=ids())
    left = [block["channels"][1] for block in report.blocks or []]
    assert all(n % 8 == 0 or n == 100 for n in left), left
    assert min(left) < 100
