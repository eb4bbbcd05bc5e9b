"""Fixtures every test may use: a tiny random Llama, a tokenizer that fits it, and a directory that holds both."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub: no test reaches for the network

import pytest
import torch

PROSE = "The spider spins a thin thread; the thread holds, for gossamer is light and strong. 0123456789 (yes!)\n" * 4


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """A function that makes a fresh Llama in eval mode, the same for the same seed; keywords override its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "initializer_range": 0.2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(sizes | more | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of at most 128 tokens; asked for special tokens, it puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([PROSE, "".join(map(chr, range(32, 127)))], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


@pytest.fixture(scope="session")
def _saved(tiny_llama: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gossamer.models import quiet

    path = tmp_path_factory.mktemp("tiny") / "model"
    with quiet():
        tiny_llama().save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny_dir(_saved: Path, tmp_path: Path) -> Path:
    """A saved ``tiny_llama()`` with ``tiny_tokenizer``: a copy of the test's own, to break as it likes."""
    return Path(shutil.copytree(_saved, tmp_path / "tiny"))
