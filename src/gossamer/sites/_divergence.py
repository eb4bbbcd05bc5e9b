"""How far what a model says has moved from what it said: KL of its next-token distributions, then and now."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gossamer.sites._calibrate import Batch, forwarding, hooked
from gossamer.sites._gradients import each_window
from gossamer.sites._walk import blocks_of


class Moved:
    """Mean KL(p‖q) a token, p what the model said when this was made, q what it says when this is called.

    Of then only the hidden states after the last block are kept; their logits are made anew where they are wanted, by the
    model with all its blocks answering so. What comes after the blocks has to stay as it is.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self._model, self._blocks = model, blocks_of(model)[1]
        self._windows = list(each_window(batches))
        self._last: list[Any] = []
        with hooked(self._blocks[-1].register_forward_hook(lambda _m, _args, out: self._last.append(out))):
            for window in self._windows:
                model(input_ids=window, use_cache=False)

    @torch.no_grad()
    def __call__(self, draw: int, tokens: int) -> float:
        """Measure on so many tokens (or all there are) of the windows, in an order that the number ``draw`` says."""
        total, seen = 0.0, 0
        for index, length in self._drawn(draw, tokens):
            window = self._windows[index][:, :length]
            now = self._model(input_ids=window, use_cache=False).logits.float().log_softmax(-1)
            then = self._then(index, length).float().log_softmax(-1)
            total += float((then.exp() * (then - now)).sum())
            seen += length
        return total / seen

    def _drawn(self, draw: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield which windows, and how many tokens of each."""
        order = list(range(len(self._windows)))
        random.Random(draw).shuffle(order)
        for index in order:
            length = min(tokens, self._windows[index].shape[1])
            if not length:
                return
            yield index, length
            tokens -= length

    def _then(self, index: int, length: int) -> Tensor:
        def cut(out: Any) -> Any:
            return (out[0][:, :length], *out[1:]) if isinstance(out, tuple) else out[:, :length]

        answer = cut(self._last[index])
        with ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(forwarding(block, lambda *_, **__: answer))
            logits: Tensor = self._model(input_ids=self._windows[index][:, :length], use_cache=False).logits
        return logits
