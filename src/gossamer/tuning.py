"""Tune: prepare a model for training that keeps its zeros, or finds them, in any loop."""

from torch import nn

from gossamer import tuners
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Pattern
from gossamer.core.spec import names_in, parse, show
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.sites._job import pattern_of

TUNERS = names_in(tuners)


def tune(
    model: nn.Module,
    method: str | Tuner = "Full",
    pattern: str | Pattern | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    targets: str | None = None,
    teacher: nn.Module | None = None,
) -> Tuning:
    """Prepare a model, in place, for training by a method that ends with exact zeros; the loop stays yours.

    Args:
        model: a transformers model, pruned, or dense for a method that chooses the mask.
        method: a spec, such as "Full" or "MaskLoRA(rank=16)".
        pattern: what the zeros will follow, for a method that chooses the mask; the others keep the zeros that are there.
        steps: how many optimizer steps there will be, for methods with a schedule.
        sparsity: how many zeros, for patterns that leave it open.
        targets: which weights, as in `prune`.
        teacher: the dense model, for methods that take weights from it.

    Returns:
        A `Tuning`: train ``.parameters()`` with an optimizer given to ``.attach``, call ``.model``, and ``.finish()``.

    Raises:
        GossamerError: an unknown method or pattern, or a model that it is not for; the model is unchanged.

    >>> import torch, gossamer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> model, tokens = LlamaForCausalLM(tiny), torch.arange(8)[None]
    >>> report = gossamer.prune(model, "Magnitude", "2:4")
    >>> tuning = tune(model, "Full", steps=1)
    >>> optimizer = torch.optim.AdamW(tuning.parameters())
    >>> tuning = tuning.attach(optimizer)
    >>> tuning.model(tokens, labels=tokens).loss.backward()
    >>> optimizer.step()
    >>> float((tuning.finish().model.layers[0].mlp.up_proj.weight == 0).float().mean())
    0.5
    """
    chosen, shape, fraction = checked(method, pattern, sparsity, steps)
    return chosen.start(model, How(steps, shape, fraction, targets, teacher))


def checked(
    method: str | Tuner, pattern: str | Pattern | None, sparsity: float | None, steps: int
) -> tuple[Tuner, Pattern | None, float | None]:
    """Read what `tune` is asked for, and return the tuner, the pattern and its sparsity.

    Raises:
        GossamerError: as `tune`, as far as it shows without a model.
    """
    chosen = tuner_of(method)
    shape = pattern_of(pattern) if pattern is not None else None
    if steps < 1:
        raise GossamerError(f"steps is at least 1, not {steps}")
    if chosen.chooses and shape is None:
        raise GossamerError(f"{show(chosen)} chooses the mask: say by which pattern, such as 2:4")
    if not chosen.chooses and (shape is not None or sparsity is not None):
        raise GossamerError(f"{show(chosen)} keeps the zeros that are there: leave pattern and sparsity out")
    if shape is not None and not isinstance(shape, chosen.patterns):
        known = ", ".join(p.__name__ for p in chosen.patterns)
        raise GossamerError(f"{show(chosen)} is defined for the patterns {known}, not for {shape}")
    return chosen, shape, shape.resolve(sparsity) if shape is not None else None


def tuner_of(method: str | Tuner) -> Tuner:
    """Read a tuner's spec."""
    chosen = parse(method, TUNERS, "method") if isinstance(method, str) else method
    if not isinstance(chosen, Tuner):
        raise GossamerError(f"{method!r} is no way of training, such as Full or MaskLoRA")
    return chosen
