"""Distil: let a pruned model learn from the dense one it was, by a loss that any trainer takes."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, pad

from gossamer.core.errors import GossamerError
from gossamer.sites._walk import text_config

AGREE = ("num_hidden_layers", "hidden_size", "vocab_size")  # of student and teacher


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    task: float = 1.0,
    logits: float = 1.0,
    hidden: float = 1.0,
    temperature: float = 1.0,
) -> "Distill":
    """Return the loss L = task · CE + logits · T² KL(teacher ‖ student) + hidden · Σₗ ‖hₗ − hₗᵗ‖² / ‖hₗᵗ‖² (SquareHead).

    The sum is over blocks, hₗ what the l-th puts out (the last, after the final norm); the divergence is of the softmax of
    logits / T. Both are means over the tokens whose next one has a label, or is attended to where there are no labels. The
    teacher runs on the student's inputs, on its own device (accelerate may offload it) and without gradients.

    Args:
        student: a transformers model, before it is wrapped or compiled.
        teacher: the dense original, another object of the same sizes; put in eval mode, and otherwise left as it is.
        task, logits, hidden: the weights of the three terms; what has weight 0 is not computed.
        temperature: T.

    Returns:
        A `Distill`: call it with the student's output and the labels, or give it to Trainer as ``compute_loss_func``.

    Raises:
        GossamerError: weights or a temperature that cannot be, or a teacher that is no such model.

    Sources: Kurtić et al., 2023, arXiv:2310.06927 (SquareHead); Hinton et al., 2015, arXiv:1503.02531 (temperature).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> student, tokens = LlamaForCausalLM(tiny).train(), torch.arange(8)[None]
    >>> with distill(student, LlamaForCausalLM(tiny)) as loss:
    ...     loss(student(tokens), tokens).backward()
    >>> sorted(loss.parts)
    ['hidden', 'logits', 'task']
    """
    weights = {"task": task, "logits": logits, "hidden": hidden}
    if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise GossamerError(f"the weights of a loss are not negative, and not all of them 0: got {weights}")
    if temperature <= 0:
        raise GossamerError(f"a temperature is more than 0, not {temperature}")
    check_teacher(student, teacher)
    return Distill(student, teacher, weights, temperature)


class Distill:
    """The loss that `distill` makes, and the hook that shows it the student's inputs; a context manager that takes it away.

    In eval mode the loss is the task's alone, so that evaluation stays comparable.

    Attributes:
        parts: the last loss's terms as numbers on the student's device, before they were weighted.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, weights: dict[str, float], temperature: float) -> None:
        self._student, self._teacher = student, teacher.eval()
        self._weights, self._temperature = weights, temperature
        self._inputs: dict[str, Any] | None = None
        self._hook = student.register_forward_pre_hook(self._see, with_kwargs=True)
        self.parts: dict[str, Tensor] = {}

    def _see(self, student: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not student.training:
            return inputs, more
        named = dict(zip(("input_ids", "attention_mask"), inputs, strict=False)) | more
        self._inputs = {k: v for k, v in named.items() if k not in ("labels", "num_items_in_batch")}
        return inputs, more | ({"output_hidden_states": True} if self._weights["hidden"] else {})

    def __call__(self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of the student's last forward pass.

        Args:
            outputs: what the student returned, with its ``loss`` if it was given the labels.
            labels: (batch, tokens), -100 = not counted; None takes the task's loss from ``outputs``.
            num_items_in_batch: counted tokens of the whole step, where it is made of several passes, as Trainer says.
        """
        if not self._student.training:
            return self._task(outputs, labels, num_items_in_batch)
        if self._inputs is None:
            raise GossamerError("the student has not run since its last loss, or was wrapped in another model before distill")
        inputs, self._inputs = self._inputs, None
        parts = {"task": self._task(outputs, labels, num_items_in_batch)} if self._weights["task"] else {}
        kept = _counted(outputs.logits, labels, inputs.get("attention_mask"))
        share = 1 if num_items_in_batch is None else kept.sum() / num_items_in_batch
        if self._weights["logits"] or self._weights["hidden"]:
            taught = self._teach(inputs)
            if self._weights["logits"]:
                parts["logits"] = share * divergence(outputs.logits[kept], _there(taught.logits, kept), self._temperature)
            if self._weights["hidden"]:
                pairs = zip(outputs.hidden_states[1:], taught.hidden_states[1:], strict=True)
                terms = [squarehead(_there(h, kept), _there(t, kept)) for h, t in pairs]
                parts["hidden"] = share * torch.stack([term.to(kept.device) for term in terms]).sum()
        self.parts = {name: part.detach() for name, part in parts.items()}
        where = outputs.logits.device
        return sum((self._weights[name] * part.to(where) for name, part in parts.items()), torch.zeros((), device=where))

    def _task(self, outputs: Any, labels: Tensor | None, items: Tensor | int | None) -> Tensor:
        if labels is None:
            if outputs.loss is None:
                raise GossamerError("there is no loss of the task: give labels, or task=0")
            return outputs.loss  # type: ignore[no-any-return]
        size: Any = self._student.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        loss: Any = self._student.loss_function
        return loss(logits=outputs.logits, labels=labels, vocab_size=size, num_items_in_batch=items)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> Any:
        where = next(self._teacher.parameters()).device
        if where.type != "meta":  # offloaded: accelerate moves them
            inputs = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return self._teacher(**inputs | {"output_hidden_states": bool(self._weights["hidden"]), "use_cache": False})

    def release(self) -> None:
        """Take the hook away: the student is as it was."""
        self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Raise GossamerError if a model cannot learn from this one: it is the same object, or of other sizes."""
    if teacher is student:
        raise GossamerError("the teacher is the student itself: load the dense model once more")
    for name in AGREE:
        ours, theirs = (getattr(text_config(m), name, None) for m in (student, teacher))
        if ours != theirs:
            raise GossamerError(f"student and teacher differ in {name}: {ours} and {theirs}")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T² KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over rows, in float32, for (rows, classes).

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
    0.0
    """
    ours, theirs = (log_softmax(x.float() / temperature, -1) for x in (student, teacher.to(student.device)))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def squarehead(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖student − teacher‖² / ‖teacher‖², in float32.

    >>> squarehead(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])).item()
    0.20000000298023224
    """
    theirs = teacher.to(student.device).float()
    return (student.float() - theirs).square().sum() / theirs.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _counted(logits: Tensor, labels: Tensor | None, attended: Tensor | None) -> Tensor:
    """Return which of the logits' positions count, bool (batch, tokens)."""
    if logits.ndim == 3 and labels is not None:
        return pad(labels[:, 1:] != -100, (0, 1)).to(logits.device)
    if logits.ndim == 3 and attended is not None:
        return attended.to(logits.device, torch.bool)
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _there(tensor: Tensor, kept: Tensor) -> Tensor:
    return tensor[kept.to(tensor.device)]
