"""Prune a model by SparseGPT to 2:4, save it, and read it back with plain transformers.

python examples/prune_in_python.py MODEL_DIRECTORY OUT
python examples/prune_in_python.py              # a tiny random model, to see the steps in seconds
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.models import causal_lm, check_directory, tokenizer


def tiny() -> LlamaForCausalLM:
    """A random Llama that is too small to say anything."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, initializer_range=0.2)).eval()


def main(source: str | None = None, out: str | None = None) -> None:
    if source is None:
        model, tokens = tiny(), None
        data = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))  # token ids, (samples, seqlen)
    else:
        check_directory(Path(source))
        model, tokens, data = causal_lm(Path(source)), tokenizer(Path(source)), "builtin"

    report = gossamer.prune(model, "SparseGPT", "2:4", data=data, tokenizer=tokens)
    print(report)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(out or f"{folder}/pruned")
        gossamer.save(model, path, report=report, tokenizer=tokens)
        again = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        parameters = dict(again.named_parameters())
        pruned = [parameters[row["name"]] for row in report.weights]
        zeros, entries = sum(int((w == 0).sum()) for w in pruned), sum(w.numel() for w in pruned)
        print(f"read back from {path}: {zeros:,} of {entries:,} entries of {len(pruned)} weights are zero")


if __name__ == "__main__":
    main(*sys.argv[1:])
