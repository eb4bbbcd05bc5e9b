"""Prune from a directory of safetensors to another, one block in memory at a time.

python examples/prune_larger_than_memory.py MODEL_DIRECTORY OUT [DATA]
python examples/prune_larger_than_memory.py       # a tiny random model, to see the steps in seconds

Killed and started again with the same arguments, it goes on after the last finished block.
"""

import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import gossamer


def tiny(folder: Path) -> Path:
    """Save a random Llama without a tokenizer, so that only a data-free method fits."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256)).save_pretrained(folder / "tiny")
    return folder / "tiny"


def prune(source: Path, out: Path, method: str, data: str | None) -> None:
    report = gossamer.prune_checkpoint(source, out, method, "2:4", data=data)
    print(report)
    print(f"peak resident memory of this process: {report.peak_bytes['resident'] / 1e9:.2f} GB")
    print(f"the dense model's weights:            {report.model['bytes'] / 1e9:.2f} GB")
    print("files:", ", ".join(sorted(path.name for path in out.iterdir())))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        prune(Path(sys.argv[1]), Path(sys.argv[2]), "SparseGPT", sys.argv[3] if len(sys.argv) > 3 else "builtin")
    else:
        with tempfile.TemporaryDirectory() as folder:
            prune(tiny(Path(folder)), Path(folder, "pruned"), "Magnitude", None)
