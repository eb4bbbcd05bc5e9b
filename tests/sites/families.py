"""Tiny random models of many families: the same code prunes them all, and no file of the package names one."""

from typing import Any

import torch

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES = {**LLAMA_LIKE, "vocab_size": 128}
OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GPT = {"n_layer": 2, "n_head": 4, "vocab_size": 128}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# name → (config class, its arguments, pruned weights in each block)
CAUSAL: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", SIZES, 7),
    "mistral": ("MistralConfig", SIZES, 7),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}, 7),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 8, **MIXED}, 7),  # blocks differ in mask and rotary embedding
    "phi": ("PhiConfig", {**SIZES, "num_key_value_heads": 4}, 6),
    "opt": ("OPTConfig", {**OLD, "ffn_dim": 64, "word_embed_proj_dim": 32}, 6),
    "gpt2": ("GPT2Config", {**GPT, "n_embd": 32}, 4),  # Conv1D: stored (in, out)
    "gpt_neox": ("GPTNeoXConfig", {**OLD, "intermediate_size": 64}, 4),
    "bloom": ("BloomConfig", {**GPT, "hidden_size": 32}, 4),
    "falcon": ("FalconConfig", OLD, 4),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}, 6),  # stacked experts
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SIZES, "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        6,
    ),
}


def causal(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """Make a tiny model of a family, the same for the same seed."""
    import transformers

    config_name, arguments, _ = CAUSAL[name]
    config = getattr(transformers, config_name)(**{**arguments, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def ids(samples: int = 4, seqlen: int = 16, seed: int = 0) -> torch.Tensor:
    """Return random token ids, (samples, seqlen)."""
    return torch.randint(128, (samples, seqlen), generator=torch.Generator().manual_seed(seed))
