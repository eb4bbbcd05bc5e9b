"""What peft's users do with an adapter: make, train, save, load, switch, disable, delete, merge, unmerge, unload."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import gossamer
from gossamer import hf
from gossamer.core.errors import GossamerError
from tests.adapters.models import BASES, KEEPING, METHODS, config, logits, pruned, same_zeros, train, tuned, weights
from tests.sites.families import causal, ids

DROPS = pytest.mark.filterwarnings("ignore:merging dropped")  # LoRA-Prune says so; see test_lora_prune_says_what_it_drops


@DROPS
@pytest.mark.parametrize("pattern", BASES)
@pytest.mark.parametrize("name", KEEPING)
def test_merging_keeps_the_zeros(name: str, pattern: str) -> None:
    base = pruned(pattern)
    before = weights(base)
    model = tuned(base, name)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())  # the base is frozen
    told = logits(model)
    plain = model.merge_and_unload()
    after = weights(plain)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert same_zeros(before, after)
    assert all(((before[n] != after[n]) == (before[n] != 0)).float().mean() > 0.9 for n in before)  # and what is kept moved
    if name != "LoRAPrune":
        torch.testing.assert_close(logits(plain), told, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("Unstructured", 0.75), ("4x1", 0.5)])
def test_pst_makes_zeros(pattern: str, sparsity: float | None) -> None:
    model = tuned(causal("llama"), "PST", pattern=pattern, sparsity=sparsity)
    told = logits(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), told, atol=1e-5, rtol=1e-5)
    for w in weights(plain).values():
        assert float((w == 0).float().mean()) == (sparsity or 0.5)
        if pattern == "2:4":
            assert int((w.view(-1, 4) != 0).sum(-1).max()) == 2


@DROPS
@pytest.mark.parametrize("bias", ["gpt2", "phi", "qwen3"])  # Conv1D with biases; Linear with; Linear without
@pytest.mark.parametrize("name", METHODS)
def test_layouts(name: str, bias: str) -> None:
    base = pruned("2:4", bias)
    before = weights(base)
    told = logits(base)
    model = peft.get_peft_model(base, config(name))
    if name != "PST":
        torch.testing.assert_close(logits(model), told, atol=1e-6, rtol=1e-6)  # nothing has changed at the start
    train(model)
    told = logits(model)
    plain = model.merge_and_unload()
    assert name == "PST" or same_zeros(before, weights(plain))
    if name != "LoRAPrune":
        torch.testing.assert_close(logits(plain), told, atol=1e-5, rtol=1e-5)


@DROPS
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_save_and_load(name: str, low: bool, tmp_path: Path) -> None:
    base = pruned()
    model = tuned(copy.deepcopy(base), name)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"] == model.peft_config["default"] or again.peft_config["default"].inference_mode
    assert not any(p.requires_grad for p in again.parameters())
    more = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in more.parameters())
    a, b = weights(again.merge_and_unload()), weights(model.merge_and_unload())
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["MaskLoRA", "ScaleLoRA", "SPP"])
def test_several_adapters(name: str) -> None:
    base = pruned()
    told = {"base": logits(base)}
    model = peft.get_peft_model(base, config(name), adapter_name="first")
    train(model)
    model.add_adapter("second", config(name, r=2))
    told["first"] = logits(model)
    model.set_adapter("second")
    assert torch.equal(logits(model), told["base"])
    train(model)
    told["second"] = logits(model)
    model.set_adapter("first")
    assert torch.equal(logits(model), told["first"])  # training the second left the first alone
    with model.disable_adapter():
        assert torch.equal(logits(model), told["base"])
    assert torch.equal(logits(model), told["first"])
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    before = weights(model)
    model.merge_adapter(["first", "second"])
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    assert same_zeros(before, weights(model))
    model.unmerge_adapter()
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(logits(model), told["first"])
    assert list(model.peft_config) == ["first"]
    assert not [n for n, _ in model.named_parameters() if "second" in n]


@DROPS
@pytest.mark.parametrize("name", METHODS)
def test_merge_unmerge_and_unload(name: str) -> None:
    base = pruned()
    before, dense = weights(base), logits(base)
    model = tuned(base, name)
    told = logits(model)
    model.merge_adapter()
    merged = logits(model)
    with model.disable_adapter():  # unmerges, as peft's own do
        assert torch.equal(logits(model), dense)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), told)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())  # to the bit
    plain = model.unload()
    assert torch.equal(logits(plain), dense)
    assert not any("gossamer" in n for n, _ in plain.named_modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["MaskLoRA", "ScaleLoRA", "SPP", "PST"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    base = pruned(dtype=dtype)
    before = weights(base)
    model = tuned(base, name)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # peft's autocast_adapter_dtype
    told = logits(model)
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain), told)  # W' is rounded in training as it is when merged
    assert {w.dtype for w in weights(plain).values()} == {dtype}
    assert name == "PST" or same_zeros(before, weights(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_makes_zero_is_counted(dtype: torch.dtype) -> None:
    base = pruned(dtype=dtype)
    before = weights(base)
    model = tuned(base, "ScaleLoRA")
    layer = model.base_model.layers[3]
    (adapter,) = layer.adapters(["default"])
    adapter.B.data[5] = 0  # an output whose every entry is scaled by nothing
    gone = int((layer.w[5] != 0).sum())
    message = rf"merging rounded {gone} kept weights to zero, most of them in {layer.name} \({gone}\)"
    with pytest.warns(UserWarning, match=message):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=message):
        after = weights(model.merge_and_unload())
    assert sum(int(((before[n] != 0) & (after[n] == 0)).sum()) for n in before) == gone
    assert not any(bool(((before[n] == 0) & (after[n] != 0)).any()) for n in before)


def test_lora_prune_says_what_it_drops() -> None:
    model = tuned(pruned(), "LoRAPrune")
    told = logits(model)
    with pytest.warns(UserWarning, match=r"merging dropped .* up to \d\d% of its norm \(in model\.layers"):
        plain = model.merge_and_unload()
    assert float((logits(plain) - told).abs().max()) > 1e-3


@pytest.mark.parametrize("name", KEEPING)
def test_a_base_with_other_zeros_is_refused(name: str, tmp_path: Path) -> None:
    base = pruned()
    model = tuned(copy.deepcopy(base), name)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    w = other.model.layers[1].mlp.up_proj.weight.data
    w[0, :4] = torch.where(w[0, :4] == 0, 1.0, 0.0)
    before, modules = weights(other), [n for n, _ in other.named_modules()]
    with pytest.raises(GossamerError, match=r"^the adapter was made on other zeros than model\.layers\.1\.mlp\.up_proj has: "):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert [n for n, _ in other.named_modules()] == modules  # nothing is left around it
    wrapped = peft.get_peft_model(other, config(name))
    with pytest.raises(GossamerError, match="made on other zeros"):
        wrapped.load_adapter(tmp_path, "second")
    assert list(wrapped.peft_config) == ["default"]
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data.copy_(w)
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.data.fill_(1)
    changed = weights(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(GossamerError, match=r"layers\.0\.mlp\.up_proj, model\.layers\.1\.mlp\.up_proj has"):
            merge()
    assert all(torch.equal(changed[n], x) for n, x in weights(model).items())
    assert all(torch.equal(before[n], x) for n, x in weights(other).items())


@pytest.mark.parametrize("name", KEEPING)
def test_a_model_without_zeros_is_refused(name: str) -> None:
    dense = causal("llama")
    modules = [n for n, _ in dense.named_modules()]
    for targets in (None, ["q_proj"], "all-linear"):
        with pytest.raises(GossamerError, match=r"^none of the \d+ weights has zeros for \w+ to keep: .* peft\.LoraConfig$"):
            peft.get_peft_model(dense, config(name, target_modules=targets))
    assert [n for n, _ in dense.named_modules()] == modules
    assert all(p.requires_grad for p in dense.parameters())
    assert not hasattr(dense, "peft_config")


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_it_does_not_take(name: str) -> None:
    with pytest.raises(GossamerError, match=rf"^{name}Config takes .*, not dropout, lora_dropout$"):
        config(name, lora_dropout=0.1, dropout=0.1)
    with pytest.raises(GossamerError, match="rank r is a whole number of at least 1, not 0"):
        config(name, r=0)


def test_pst_wants_steps_and_a_pattern_that_fits() -> None:
    with pytest.raises(GossamerError, match=r"PSTConfig\(steps=\.\.\.\)"):
        hf.PSTConfig(pattern="2:4")
    with pytest.raises(GossamerError, match="needs a sparsity"):
        hf.PSTConfig(steps=3)
    with pytest.raises(GossamerError, match="below 1 together"):
        hf.PSTConfig(steps=3, pattern="2:4", warmup=0.6, cooldown=0.5)
    model = causal("llama")
    with pytest.raises(GossamerError, match=r"q_proj: it: the pattern 3:5 needs an input dimension that 5 divides"):
        peft.get_peft_model(model, config("PST", pattern="3:5"))
    assert not any("gossamer" in n for n, _ in model.named_modules())


def test_targets() -> None:
    base = pruned()
    base.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    assert len(peft.get_peft_model(copy.deepcopy(base), config("MaskLoRA")).base_model.layers) == 13  # those with zeros
    some = peft.get_peft_model(copy.deepcopy(base), config("MaskLoRA", target_modules=["up_proj"])).base_model.layers
    assert [layer.name for layer in some] == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]  # named, dense or not
    few = peft.get_peft_model(copy.deepcopy(base), config("MaskLoRA", target_modules=r".*\.1\.mlp\..*_proj"))
    assert len(few.base_model.layers) == 3
    with pytest.raises(GossamerError, match="embed_tokens is a Embedding: MASKLORA adapts Linear and Conv1D"):
        peft.get_peft_model(base, config("MaskLoRA", target_modules=["embed_tokens"]))


def test_modules_to_save_are_trained_and_saved_too(tmp_path: Path) -> None:
    base = pruned()
    model = tuned(copy.deepcopy(base), "MaskLoRA", modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(again.merge_and_unload().lm_head.weight, causal("llama").lm_head.weight)


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # transformers' method is to be renamed
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    losses = []
    for wrap in (lambda model: model, lambda model: checkpointed(model, reentrant)):
        torch.manual_seed(0)
        model = peft.get_peft_model(wrap(pruned()), config(name))
        losses.append(train(model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@DROPS
@pytest.mark.parametrize("name", METHODS)
def test_trainer(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    base = pruned()
    before = weights(base)
    model = peft.get_peft_model(copy.deepcopy(base), config(name))
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False}
    settings = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, save_strategy="steps", save_steps=3, **quiet)
    trainer = Trainer(model, settings, train_dataset=rows)
    model.base_model.follow(trainer.create_optimizer())
    trainer.train()
    saved = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint-3")
    assert torch.equal(logits(saved), logits(model.eval()))
    assert not torch.equal(logits(saved), logits(base))
    after = weights(model.merge_and_unload())
    assert name == "PST" or same_zeros(before, after)


@pytest.mark.parametrize("name", ["MaskLoRA", "PST"])
def test_the_trainer_resumes(name: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(16)]
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False}
    settings = {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 2, "per_device_train_batch_size": 2, **quiet}
    results = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = peft.get_peft_model(pruned(), config(name, **({"steps": 4} if name == "PST" else {})))
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows)
        model.base_model.follow(trainer.create_optimizer())
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append(weights(model.merge_and_unload()))
    assert all(torch.equal(w, results[1][n]) for n, w in results[0].items())


@pytest.mark.filterwarnings("ignore")  # TRL has warnings of its own, by the release
def test_trl_takes_the_configuration(tiny_dir: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    base = gossamer.load(tiny_dir)
    gossamer.prune(base, "Magnitude", "2:4")
    before = weights(base)
    rows = Dataset.from_list([{"text": "The spider spins a thin thread."}] * 8)
    settings = trl.SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[], dataloader_pin_memory=False)
    tokens = AutoTokenizer.from_pretrained(tiny_dir)
    trainer = trl.SFTTrainer(base, settings, train_dataset=rows, processing_class=tokens, peft_config=config("MaskLoRA"))
    trainer.train()
    after = weights(trainer.model.merge_and_unload())
    assert same_zeros(before, after)
    assert not all(torch.equal(before[n], after[n]) for n in before)


def test_an_adapter_that_broke_is_not_merged() -> None:
    base = pruned()
    model = tuned(base, "MaskLoRA")
    before = weights(model)
    model.base_model.layers[0].adapters(["default"])[0].A.data[0] = torch.nan
    with pytest.raises(GossamerError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"], weights(model)["model.layers.0.self_attn.q_proj.weight"]
    )
    model.merge_adapter()  # asked not to look; the zeros are zeros all the same
    assert same_zeros(before, weights(model))


def test_generation_and_status() -> None:
    model = tuned(pruned(), "MaskLoRA")
    start = {"input_ids": ids(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    written = model.generate(**start, max_new_tokens=4, do_sample=False, pad_token_id=0)
    status = model.get_model_status()
    assert (status.adapter_model_type, status.enabled, status.peft_types) == ("SparseTuner", True, {"default": "MASKLORA"})
    plain = model.merge_and_unload()
    assert torch.equal(plain.generate(**start, max_new_tokens=4, do_sample=False, pad_token_id=0), written)


def test_a_pruned_model_is_saved_after_merging(tmp_path: Path) -> None:
    plain = tuned(pruned(), "MaskLoRA").merge_and_unload()
    gossamer.save(plain, tmp_path / "out")
    assert isinstance(gossamer.load(tmp_path / "out"), nn.Module)
