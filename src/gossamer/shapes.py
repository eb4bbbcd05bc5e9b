"""Models of known shapes with random weights, for speed, which does not depend on the values."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer.core.errors import GossamerError
from gossamer.core.report import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LLAMA_3 = {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3b": {
        **_LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config_of(shape: str | Path) -> "PretrainedConfig":
    """Return the configuration of a named shape (llama-1b, llama-3b, llama-8b), a config.json or a model directory.

    Raises:
        GossamerError: there is no such shape or file, or it is no configuration that transformers knows.
    """
    from transformers import AutoConfig, LlamaConfig

    from gossamer.models import quiet

    if str(shape) in SHAPES:
        return LlamaConfig(**SHAPES[str(shape)], max_position_embeddings=8192, architectures=["LlamaForCausalLM"])
    path = Path(shape)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise GossamerError(f"no configuration {shape}: give a config.json, a model directory, or {', '.join(SHAPES)}")
    read_json(file)
    with quiet():
        try:
            return AutoConfig.from_pretrained(file, trust_remote_code=False)
        except Exception as error:  # transformers' errors share no base
            raise GossamerError(f"cannot read the config {file}: {' '.join(str(error).split())[:300]}") from error


def random_model(config: "PretrainedConfig", dtype: torch.dtype, device: torch.device | str = "cpu") -> "PreTrainedModel":
    """Build a causal language model with random weights, in eval mode, without ever holding it in another dtype."""
    from transformers import AutoModelForCausalLM

    from gossamer.models import quiet

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with quiet(), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)
