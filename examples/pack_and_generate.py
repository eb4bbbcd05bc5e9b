"""Prune a model, save it packed, load it without the zeros, and write with it.

python examples/pack_and_generate.py MODEL_DIRECTORY OUT
python examples/pack_and_generate.py            # a tiny random model, to see the steps in seconds
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer
from gossamer.decode import greedy
from gossamer.models import causal_lm, check_directory


def tiny() -> LlamaForCausalLM:
    """A random Llama that is too small to say anything."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, initializer_range=0.2)).eval()


def main(source: str | None = None, out: str | None = None) -> None:
    if source is None:
        model = tiny()
    else:
        check_directory(Path(source))
        model = causal_lm(Path(source))

    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.7)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    dense = [token for token, _ in greedy(model, prompt, 8)]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(out or f"{folder}/packed")
        gossamer.save(model, path, packed=True)
        packed = gossamer.load(path)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        whole = sum(p.nbytes for p in model.parameters())
        print(f"{whole:,} bytes of weights, {size:,} in {path}")
        print(f"the packed model writes what the dense one does: {[token for token, _ in greedy(packed, prompt, 8)] == dense}")


if __name__ == "__main__":
    main(*sys.argv[1:])
