"""Text → token windows: what calibration and evaluation read, cut by one protocol.

A text is tokenised whole, without special tokens, and cut into consecutive windows without overlap; the last, partial one is
dropped.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCEPTED = (
    "a text file, a .jsonl file with a field text, a directory of those, builtin, or a Hugging Face data set (name:config)"
)
PLAIN = frozenset({".txt", ".md"})
JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
SHARE = 0.75  # of the built-in prose, for calibration


def texts(data: str | Path, *, split: Literal["calibration", "evaluation"]) -> str:
    """Return one whole text; where there are several documents they are joined by an empty line.

    Args:
        data: a text file, a .jsonl file, a directory of those, ``builtin``, or a Hugging Face data set as name or name:config.
        split: for ``builtin`` and data sets, which part (a data set's train or test split). Files have one part and ignore it.

    Raises:
        GossamerError: there is no such data, or it holds no readable text.
    """
    if split not in ("calibration", "evaluation"):
        raise GossamerError(f"split {split!r} is neither calibration nor evaluation")
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix in PLAIN | JSON_LINES)
        if not files:
            raise GossamerError(f"{path} holds no text: no {', '.join(sorted(PLAIN | JSON_LINES))} file in it")
        return "\n\n".join(map(_file, files))
    if path.exists():
        return _file(path)
    if data == "builtin":
        return _builtin(split)
    name = str(data)
    if isinstance(data, Path) or path.is_absolute() or name.startswith((".", "~")) or path.suffix in PLAIN | JSON_LINES:
        raise GossamerError(f"no data {name!r}: there is no such file; it may be {ACCEPTED}")
    return _data_set(name, split)


def windows(text: str, tokenizer: "PreTrainedTokenizerBase", seqlen: int) -> Tensor:
    """Cut a text into windows of ``seqlen`` tokens: ids of shape (n, seqlen), int64, n = ⌊tokens / seqlen⌋ ≥ 1.

    Raises:
        GossamerError: the text is shorter than one window, or seqlen is no positive integer.
    """
    _positive("seqlen", seqlen)
    # Not verbose: the tokenizer would warn that the whole text is longer than the model's context, which windows never are.
    tokens = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    count = len(tokens) // seqlen
    if not count:
        raise GossamerError(f"the text has {len(tokens)} tokens, and one window of seqlen {seqlen} needs {seqlen}")
    return torch.tensor(tokens[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def calibration(
    data: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seqlen: int = 512,
    samples: int = 32,
    sample: Literal["random", "first"] = "random",
    seed: int = 0,
) -> Tensor:
    """Return ``samples`` windows of a text's calibration split: ids of shape (samples, seqlen), int64.

    Args:
        sample: ``first`` takes the first windows; ``random`` draws without replacement with ``seed``, in the order drawn.

    Raises:
        GossamerError: the text has fewer windows than asked for, or an argument is out of range.
    """
    _positive("samples", samples)
    if sample not in ("random", "first"):
        raise GossamerError(f"sample {sample!r} is neither random nor first")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise GossamerError(f"seed is an integer from 0 to 2**63 - 1, not {seed!r}")
    found = windows(texts(data, split="calibration"), tokenizer, seqlen)
    if len(found) < samples:
        raise GossamerError(f"{data} has {len(found)} windows of {seqlen} tokens, fewer than the {samples} samples asked for")
    if sample == "first":
        return found[:samples].clone()
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:samples]]


def evaluation(
    data: str | Path, tokenizer: "PreTrainedTokenizerBase", *, seqlen: int = 512, first: int | None = None
) -> Tensor:
    """Return the ``first`` so many windows (all by default) of a text's evaluation split: ids of shape (n, seqlen), int64.

    Raises:
        GossamerError: the text has fewer windows than asked for, or an argument is out of range.
    """
    if seqlen == 1:
        raise GossamerError("seqlen is at least 2 for evaluation: the first token of a window is context only")
    found = windows(texts(data, split="evaluation"), tokenizer, seqlen)
    if first is None:
        return found
    _positive("windows", first)
    if len(found) < first:
        raise GossamerError(f"{data} has {len(found)} windows of {seqlen} tokens, fewer than the {first} asked for")
    return found[:first].clone()


def _file(path: Path) -> str:
    """Read a text file, or the documents of a JSON-lines file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GossamerError(f"{path} is not UTF-8 text (byte {error.start}); data may be {ACCEPTED}") from None
    except OSError as error:
        raise GossamerError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix not in JSON_LINES:
        return text
    return "\n\n".join(_document(line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _document(line: str, where: str) -> str:
    """Return the field ``text`` of one JSON line."""
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise GossamerError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise GossamerError(f"{where}: no string field text in it")
    return str(row["text"])


def _builtin(split: str) -> str:
    """Return prose that every CPython carries: the topics of ``help()``, sorted, cut between two of them at three quarters.

    Topics quote one another, so the evaluation split leaves out the paragraphs that calibration has seen. The text differs a
    little between Python versions.
    """
    from pydoc_data.topics import topics

    documents = [topics[key] for key in sorted(topics)]
    total, read, count = sum(map(len, documents)), 0, 0
    while read + len(documents[count]) <= SHARE * total:
        read += len(documents[count])
        count += 1
    if split == "calibration":
        return "\n\n".join(documents[:count])
    seen = {paragraph.strip() for document in documents[:count] for paragraph in document.split("\n\n")}
    return "\n\n".join(p for document in documents[count:] for p in document.split("\n\n") if p.strip() not in seen)


def _data_set(name: str, split: str) -> str:
    """Read the column ``text`` of a Hugging Face data set's train (calibration) or test (evaluation) split."""
    try:
        import datasets
    except ImportError:
        told = f"there is no such file, and a Hugging Face data set needs: pip install datasets. Data may be {ACCEPTED}"
        raise GossamerError(f"no data {name!r}: {told}") from None

    from huggingface_hub import HfApi, constants

    path, _, config = name.partition(":")
    try:
        if not constants.HF_HUB_OFFLINE:  # with it, data sets already downloaded are read
            HfApi().dataset_info(path, timeout=20)  # asked first: load_dataset tries a misspelt name for half a minute
        rows = datasets.load_dataset(path, config or None, split="train" if split == "calibration" else "test")
    except Exception as error:  # its errors, and the hub's beneath, share no base
        told = f"there is no such file, and no such data set could be read: {' '.join(str(error).split())[:300]}"
        raise GossamerError(f"no data {name!r}: {told}") from error
    if "text" not in rows.column_names:
        raise GossamerError(f"the data set {name!r} has no column text, only {', '.join(rows.column_names)}")
    return "\n\n".join(rows["text"])


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GossamerError(f"{name} is a positive integer, not {value!r}")
