import json
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.evaluate import perplexity, tasks
from gossamer.models import tokenizer


@pytest.fixture
def ids():
    return torch.randint(0, 128, (5, 40), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_the_exponential_of_transformers_own_loss(tiny_llama, ids):
    model = tiny_llama()
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in ids]
    found = perplexity(model, ids)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert (found["tokens"], found["seqlen"], found["windows"]) == (5 * 39, 40, 5)
    assert found["seconds"] > 0
    json.dumps(found, allow_nan=False)


def test_a_model_of_equal_logits_has_the_vocabulary_as_perplexity(tiny_llama, ids):
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, ids)["perplexity"] == pytest.approx(128)


def test_windows_do_not_see_one_another(tiny_llama, ids):
    model = tiny_llama()
    alone = [math.log(perplexity(model, window[None])["perplexity"]) for window in ids]
    for batch in (1, 2, 5, 8):
        assert math.log(perplexity(model, ids, batch=batch)["perplexity"]) == pytest.approx(sum(alone) / 5, rel=1e-5)


def test_long_windows_are_scored_in_slices(tiny_llama):
    ids = torch.randint(0, 128, (1, 400), generator=torch.Generator().manual_seed(1))
    model = tiny_llama(max_position_embeddings=512)
    assert perplexity(model, ids)["perplexity"] == pytest.approx(model(input_ids=ids, labels=ids).loss.exp().item(), rel=1e-5)


def test_low_precision_is_scored_in_float32(tiny_llama, ids):
    model = tiny_llama().to(torch.bfloat16)
    wanted = model(input_ids=ids, labels=ids).loss.exp().item()
    assert perplexity(model, ids, batch=5)["perplexity"] == pytest.approx(wanted, rel=1e-4)


def test_the_model_is_left_as_it_was(tiny_llama, ids):
    model = tiny_llama().train()
    model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    perplexity(model, ids[:1])
    assert {name: module.training for name, module in model.named_modules()} == before
    model(input_ids=ids, labels=ids).loss.backward()  # nothing kept from scoring forbids it


def test_dropout_is_off_while_scoring(tiny_llama, ids):
    model = tiny_llama(attention_dropout=0.5)
    wanted = perplexity(model, ids)["perplexity"]
    assert perplexity(model.train(), ids)["perplexity"] == wanted


def test_progress_sees_every_batch(tiny_llama, ids):
    seen = []

    def progress(iterable, description, total):
        seen.append((description, total))
        for item in iterable:
            seen.append(item)
            yield item

    perplexity(tiny_llama(), ids, batch=2, device="cpu", progress=progress)
    assert seen == [("perplexity", 3), 0, 2, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_reported_not_hidden(tiny_llama, ids, value):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[2, 0]] = value
    found = perplexity(model, ids)
    broken = int((ids == ids[2, 0]).any(dim=1).sum())
    assert found["perplexity"] is None
    assert f"of {broken} of 5 windows is NaN or infinite" in found["note"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (torch.zeros(40, dtype=torch.int64), "ids are int64 windows"),
        (torch.zeros(0, 40, dtype=torch.int64), "ids are int64 windows"),
        (torch.zeros(2, 1, dtype=torch.int64), "ids are int64 windows"),
        (torch.zeros(2, 8), "ids are int64 windows"),
        (torch.full((2, 8), 128), "token id 128, but LlamaForCausalLM has a vocabulary of 128"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tiny_llama, bad, told):
    with pytest.raises(GossamerError, match=told):
        perplexity(tiny_llama(), bad)


def test_a_batch_of_none_is_refused(tiny_llama, ids):
    with pytest.raises(GossamerError, match="batch is a positive integer"):
        perplexity(tiny_llama(), ids, batch=0)


def test_what_is_no_causal_language_model_is_refused(tiny_llama, ids):
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128}
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=128))
    for model in (BertForMaskedLM(BertConfig(**small)), t5, tiny_llama().model):
        with pytest.raises(GossamerError, match=f"{type(model).__name__} is no causal language model: it has no perplexity"):
            perplexity(model, ids)


def test_without_lm_eval_the_command_is_told(monkeypatch, tiny_dir):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(GossamerError, match="pip install lm-eval"):
        tasks(tiny_dir, "arc_easy")


@pytest.fixture
def lm_eval(monkeypatch):
    """An lm-eval that knows two tasks, and what it was asked."""
    asked = {}

    def simple_evaluate(**options):
        asked.update(options)
        values = {
            "alias": "arc",
            "sample_len": 3,
            "acc,none": 0.5,
            "acc_stderr,none": "N/A",
            "exact,strict": math.nan,
            "f1,strict": 1,
        }
        return {"results": {"arc_easy": values}}

    def manager(include_path=None):
        return SimpleNamespace(all_tasks=["arc_easy", "piqa"], include_path=include_path)

    package, inside = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, inside.TaskManager = simple_evaluate, manager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", inside)
    return asked


def test_tasks_hands_over_and_returns_the_numbers(lm_eval, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = tasks(tmp_path / "model", "arc_easy, piqa", tmp_path, limit=3, batch=2, device="cpu")
    assert found == {"arc_easy": {"acc": 0.5, "f1,strict": 1.0}}
    assert lm_eval["model"] == "hf"
    assert lm_eval["model_args"] == {"pretrained": str(tmp_path / "model")}
    assert lm_eval["tasks"] == ["arc_easy", "piqa"]
    assert (lm_eval["limit"], lm_eval["batch_size"], lm_eval["device"]) == (3, 2, "cpu")
    assert lm_eval["task_manager"].include_path == tmp_path


@pytest.mark.parametrize(
    ("names", "folder", "told"),
    [
        ("arc_easy,nosuch", None, "lm-eval knows no task 'nosuch'"),
        (" , ", None, "lm-eval knows no task ' , '"),
        ("piqa", "missing", "no folder of task files .*missing"),
    ],
)
def test_unknown_tasks_are_named(lm_eval, tmp_path, names, folder, told):
    with pytest.raises(GossamerError, match=told):
        tasks(tmp_path, names, folder and tmp_path / folder)
    assert not lm_eval


@pytest.mark.skipif(os.environ.get("GOSSAMER_SLOW") != "1", reason="lm-eval reads every task file first: set GOSSAMER_SLOW=1")
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_itself(tiny_dir, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": "a", "choices": ["thread", "spider"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"task": "threads", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    own |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}}
    own |= {"doc_to_text": "question", "doc_to_choice": "choices", "doc_to_target": "answer"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "threads.yaml").write_text(json.dumps(own))
    found = tasks(tiny_dir, "threads", tmp_path / "tasks", limit=4)
    assert found["threads"]["acc"] == 0.5
    model, tokens = gossamer.load(tiny_dir), tokenizer(tiny_dir)
    assert tasks(model, "threads", tmp_path / "tasks", tokenizer=tokens, limit=4, device="cpu") == found
