"""Decoding: the tokens of transformers' own greedy search, and of the packed model."""

from typing import Any

import pytest
import torch

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.decode import greedy, prefill_seconds, step_seconds
from tests.sites.families import causal


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_tokens_are_those_of_generate(family: str) -> None:
    model = causal(family, max_position_embeddings=64)
    prompt = torch.tensor([[5, 9, 2, 77]])
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [token for token, _ in greedy(model, prompt, 12)] == wanted[0, 4:].tolist()


def test_packed_tokens_are_the_dense_ones(tiny_llama: Any) -> None:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.6)
    prompt = torch.tensor([[3, 1, 4]])
    dense = list(greedy(model, prompt, 20))
    gossamer.pack(model, "Bitmask")
    packed = list(greedy(model, prompt, 20))
    assert [t for t, _ in packed] == [t for t, _ in dense]
    torch.testing.assert_close(packed[0][1], dense[0][1], rtol=1e-4, atol=1e-5)


def test_it_stops_at_a_stop_token(tiny_llama: Any) -> None:
    model, prompt = tiny_llama(), torch.tensor([[3, 1, 4]])
    tokens = [t for t, _ in greedy(model, prompt, 8)]
    assert [t for t, _ in greedy(model, prompt, 8, stop=[tokens[3]])] == tokens[: tokens.index(tokens[3])]


def test_more_than_the_context_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(GossamerError, match="over the model's context of 128"):
        next(greedy(tiny_llama(), torch.zeros(1, 100, dtype=torch.int64), 29))


def test_steps_are_timed(tiny_llama: Any) -> None:
    model = tiny_llama()
    assert step_seconds(model, batch=2, context=8, repeats=3) > 0
    assert prefill_seconds(model, 16, repeats=2) > 0
