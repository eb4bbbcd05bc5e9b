import json
import sys
from types import SimpleNamespace

import pytest
import torch

from gossamer.core.errors import GossamerError
from gossamer.data import calibration, texts, windows


def read(data):
    return texts(data, split="evaluation")


def test_a_file_is_one_text_in_any_suffix(tmp_path):
    for name in ("a.txt", "a.rst", "noend"):
        (tmp_path / name).write_text("naïve — text\n", encoding="utf-8")
        assert read(tmp_path / name) == read(str(tmp_path / name)) == "naïve — text\n"


def test_json_lines_join_documents_by_an_empty_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two\\n", "id": 3}\n', encoding="utf-8")
    assert read(file) == "one\n\ntwo\n"


def test_a_directory_joins_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "c.png").write_bytes(b"\xff\x00")
    assert read(tmp_path) == "first\n\nsecond"


def test_builtin_splits_share_no_paragraph():
    first, second = texts("builtin", split="calibration"), texts("builtin", split="evaluation")
    assert len(first) > 2 * len(second) > 100_000
    assert not {p.strip() for p in first.split("\n\n")} & {p.strip() for p in second.split("\n\n")}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\xff\xfe\x00", r"a\.txt is not UTF-8 text \(byte 0\)"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "y"}\n', r"a\.jsonl, line 2: no string field text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}', r"line 3: no string field text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"line 2 is not JSON"),
        ("a.json", b'["text"]', r"line 1: no string field text"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GossamerError, match=told):
        read(tmp_path / name)


def test_an_empty_directory_is_an_error(tmp_path):
    with pytest.raises(GossamerError, match="holds no text"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/such/file", "~/no/such/file"])
def test_a_missing_file_says_what_is_accepted(name):
    with pytest.raises(GossamerError, match=r"no such file; it may be a text file, a \.jsonl"):
        read(name)


def test_a_bad_split_is_an_error():
    with pytest.raises(GossamerError, match="neither calibration nor evaluation"):
        texts("builtin", split="test")


def test_a_data_set_gives_its_train_or_test_column(monkeypatch):
    class Rows(dict):
        column_names = property(list)

    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return Rows(text=["a", "b"]) if config else Rows(content=["a"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts("owner/name:small", split="calibration") == "a\n\nb"
    assert texts("owner/name:small", split="evaluation") == "a\n\nb"
    assert asked == [("owner/name", "small", "train"), ("owner/name", "small", "test")]
    with pytest.raises(GossamerError, match="has no column text, only content"):
        read("owner/name")


def test_a_data_set_that_cannot_be_read_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise FileNotFoundError("nothing\nthere")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(GossamerError, match=r"^no data 'owner/name': .*no such data set could be read: nothing there$"):
        read("owner/name")


def test_without_datasets_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GossamerError, match="pip install datasets"):
        read("owner/name")


def test_windows_are_the_text_tokenised_whole_without_special_tokens(tiny_tokenizer):
    text = "The spider spins a thin thread. " * 40  # longer than the tokenizer's model_max_length
    tokens = tiny_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    found = windows(text, tiny_tokenizer, 100)
    assert found.dtype == torch.int64
    assert found.shape == (len(tokens) // 100, 100)
    assert found.flatten().tolist() == tokens[: found.numel()]
    assert 0 < len(tokens) - found.numel() < 100


def test_a_text_shorter_than_a_window_says_by_how_much(tiny_tokenizer):
    with pytest.raises(GossamerError, match=r"has 2 tokens, and one window of seqlen 16 needs 16"):
        windows("~~", tiny_tokenizer, 16)
    with pytest.raises(GossamerError, match="has 0 tokens"):
        windows("", tiny_tokenizer, 16)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"Document {i}."}) for i in range(200)))
    return tmp_path / "a.jsonl"


def test_first_takes_the_first_windows(file, tiny_tokenizer):
    whole = windows(texts(file, split="calibration"), tiny_tokenizer, 32)
    assert torch.equal(calibration(file, tiny_tokenizer, seqlen=32, samples=5, sample="first"), whole[:5])


def test_random_draws_without_replacement_by_seed(file, tiny_tokenizer):
    whole = windows(texts(file, split="calibration"), tiny_tokenizer, 32)
    drawn = calibration(file, tiny_tokenizer, seqlen=32, samples=len(whole), seed=3)
    assert sorted(drawn.tolist()) == sorted(whole.tolist())
    some = calibration(file, tiny_tokenizer, seqlen=32, samples=4, seed=3)
    assert torch.equal(some, drawn[:4])
    assert not torch.equal(some, calibration(file, tiny_tokenizer, seqlen=32, samples=4, seed=4))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples": 10_000}, r"has \d+ windows of 32 tokens, fewer than the 10000 samples"),
        ({"samples": 0}, "samples is a positive integer, not 0"),
        ({"samples": 2.0}, "samples is a positive integer"),
        ({"seqlen": 0}, "seqlen is a positive integer"),
        ({"seqlen": True}, "seqlen is a positive integer"),
        ({"sample": "last"}, "sample 'last' is neither random nor first"),
    ],
)
def test_bad_arguments_are_named(file, tiny_tokenizer, options, told):
    with pytest.raises(GossamerError, match=told):
        calibration(file, tiny_tokenizer, **({"seqlen": 32, "samples": 2} | options))
