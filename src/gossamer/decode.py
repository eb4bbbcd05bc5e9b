"""Decoding token by token with a static cache: the text it writes, and the time it takes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.timing import REPEATS, seconds


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, tokens: int, stop: Iterable[int] = ()) -> Iterator[tuple[int, Tensor]]:
    """Yield the most likely next token and its logits, one after the other.

    Args:
        model: a causal language model in eval mode.
        ids: the prompt, shape (1, n).
        tokens: how many at most.
        stop: token ids that end the text (the one that ends it is not given out).

    Raises:
        GossamerError: the prompt and the tokens are more than the model's context.
    """
    from transformers import StaticCache

    config: Any = model.config
    length, context = ids.shape[1] + tokens, getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and length > context:
        raise GossamerError(f"{ids.shape[1]} tokens of prompt and {tokens} more are over the model's context of {context}")
    cache = StaticCache(config=config, max_cache_len=length)
    ending = set(stop)
    for _ in range(tokens):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = int(logits.argmax())
        if token in ending:
            return
        yield token, logits
        ids = ids.new_tensor([[token]])


@torch.no_grad()
def step_seconds(model: nn.Module, batch: int = 1, context: int = 128, repeats: int = REPEATS) -> float:
    """Return the median time of one decoding step of ``batch`` sequences that hold ``context`` tokens.

    On a GPU the step is captured in a CUDA graph and its replays are timed.
    """
    step = _step(model, batch, context, 3 * repeats)
    return seconds(lambda _: step(), next(model.parameters()).device, turns=1, repeats=repeats)


@torch.no_grad()
def prefill_seconds(model: nn.Module, tokens: int, repeats: int = 5) -> float:
    """Return the median time of one forward pass over a prompt of ``tokens`` tokens, logits of the last one."""
    device = next(model.parameters()).device
    config: Any = model.config
    ids = torch.arange(tokens, device=device)[None] % config.vocab_size
    return seconds(lambda _: model(ids, use_cache=False, logits_to_keep=1).logits, device, turns=1, repeats=repeats)


def _step(model: nn.Module, batch: int, context: int, room: int) -> Callable[[], Tensor]:
    from transformers import StaticCache

    device = next(model.parameters()).device
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=context + room)
    prompt = torch.arange(context, device=device).repeat(batch, 1) % config.vocab_size
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids = prompt[:, :1].clone()

    def step() -> Tensor:
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
        return logits

    return step
