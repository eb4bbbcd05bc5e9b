"""MaskLLM: the weights stay, and which of them are kept is learned as a choice among all N:M masks of each group."""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Pattern
from gossamer.core.schedule import Linear
from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.tuners._weights import Weight, plain, restore, scaled, weights_of

SPREAD = 0.01  # the standard deviation of the logits at first


@spec
class MaskLLM(Tuner):
    """Learnable N:M masks: of each group's C(M, N) candidates Sᵢ the logits π are trained, and nothing else.

        y = softmax((κπ + g) / τ),   mask = Σᵢ yᵢSᵢ,   L = loss − λ Σ‖W ⊙ mask‖²,   g ~ Gumbel(0, 1)

    τ and κ go linearly from their first value to their second. The logits begin as N(0, σ), σ = 0.01, plus
    ``prior`` · σ · (Sᵢ · M₀ − N² / M), where M₀ are the entries that are not zero now, or the largest of a dense model. In eval
    mode, and in the end, the mask is the best candidate's. W is the teacher's, where there is one, since a pruned model's
    weights have lost theirs. The gradient of −λ Σ‖W ⊙ mask‖² is added right before each step, so it counts once a step whatever
    the loop accumulates, and is not clipped. A step has one g, the same for all its passes, made from ``seed`` and its number.

    In float32 the logits of 2:4 take 6 numbers a group, 1.5 a weight; with their gradients and AdamW's moments, 6 a weight.

    Args:
        temperature: τ, first and last.
        scale: κ, first and last.
        prior: how much the logits favour the mask that is there.
        regularizer: λ.
        seed: of the noise.

    Raises:
        GossamerError: hyper-parameters that cannot be; a pattern that does not fit; more than 1000 candidates; a pruned model
            without a teacher, or a teacher that has other weights.

    Source: Fang et al., 2024, arXiv:2409.17481.

    >>> MaskLLM(prior=5.0)
    MaskLLM(prior=5.0)
    """

    temperature: tuple[float, float] = (4.0, 0.05)
    scale: tuple[float, float] = (100.0, 500.0)
    prior: float = 3.0
    regularizer: float = 1e-5
    seed: int = 0
    rate: ClassVar[float] = 2e-3
    chooses: ClassVar[bool] = True
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM,)

    def __post_init__(self) -> None:
        pairs = (self.temperature, self.scale)
        if any(not isinstance(pair, tuple) or len(pair) != 2 or min(pair) <= 0 for pair in pairs):
            raise GossamerError(
                f"temperature and scale are pairs, first and last, of more than 0; got {pairs[0]} and {pairs[1]}"
            )
        if self.regularizer < 0:
            raise GossamerError(f"MaskLLM wants a regularizer ≥ 0, not {self.regularizer}")

    def start(self, model: nn.Module, how: How) -> Tuning:
        return _MaskLLM(model, how, self)


class _MaskLLM(Tuning):
    def __init__(self, model: nn.Module, how: How, method: MaskLLM) -> None:
        self.model, self._method, self._steps = model, method, 0
        last = max(how.steps - 1, 1)  # the last step is trained at the last values
        self._temperature, self._scale = Linear(*method.temperature, steps=last), Linear(*method.scale, steps=last)
        self._hooks: list[RemovableHandle] = []
        weights = weights_of(model, how)
        dense = _dense(weights, how)
        self._layers = {weight: _Choice(weight, how, method, index) for index, weight in enumerate(weights)}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        for weight, layer in self._layers.items():
            with torch.no_grad():
                weight.parameter.copy_(dense[weight])
            weight.parametrize(layer.train(model.training))
        self._set()

    def _set(self) -> None:
        for layer in self._layers.values():
            layer.step, layer.temperature, layer.scale = self._steps, self._temperature(self._steps), self._scale(self._steps)

    def parameters(self) -> list[nn.Parameter]:
        return [layer.logits for layer in self._layers.values()]

    def attach(self, optimizer: Optimizer) -> Self:
        optimizer = plain(optimizer, self.parameters())
        self._release()
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        return self

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if scaled(optimizer):
            raise GossamerError("gradients are scaled until the step: use bfloat16, or an optimizer with fused=False")
        for weight, layer in self._layers.items():
            if self._method.regularizer and layer.logits.grad is not None:
                with torch.enable_grad():
                    kept = layer.soft().mul(weight.matrices(weight.parameter)).square().sum()
                    layer.logits.grad -= torch.autograd.grad(self._method.regularizer * kept, layer.logits)[0]

    def _after(self, *_: Any) -> None:
        self._steps += 1
        self._set()

    def finish(self) -> nn.Module:
        self._release()
        for weight, layer in self._layers.items():
            weight.finish(weight.parameter * weight.stored(layer.hard()))
        self._layers = {}
        for parameter in self._trained:
            parameter.requires_grad_()
        return self.model

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Tensor]:
        numbers = {"steps": torch.tensor(self._steps), "seed": torch.tensor(self._method.seed)}
        return {name: tensor.clone() for name, tensor in self._tensors().items()} | numbers

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if int(state["seed"]) != self._method.seed:
            raise GossamerError(f"this state is of another tuning: its seed is {int(state['seed'])}, not {self._method.seed}")
        restore(self._tensors(), {name: tensor for name, tensor in state.items() if name not in ("steps", "seed")})
        self._steps = int(state["steps"])
        self._set()

    def _tensors(self) -> dict[str, Tensor]:
        return {f"logits.{weight.name}": layer.logits.detach() for weight, layer in self._layers.items()}


class _Choice(nn.Module):
    """The choice of a mask for each group of a weight; logits of shape (experts or 1, out, groups, candidates)."""

    candidates: Tensor
    step: int
    temperature: float
    scale: float

    def __init__(self, weight: Weight, how: How, method: MaskLLM, index: int) -> None:
        super().__init__()
        assert isinstance(how.pattern, NM)
        n, m = how.pattern.n, how.pattern.m
        self._weight, self._seed, self._index = weight, method.seed, index
        mask = weight.matrices(weight.mask(how))
        self.register_buffer("candidates", candidates(n, m).to(mask.device), persistent=False)
        likeness = torch.unflatten(mask.float(), -1, (-1, m)) @ self.candidates.T - n * n / m
        noise = torch.randn(likeness.shape, generator=self._generator(mask.device, step=-1), device=mask.device)
        self.logits = nn.Parameter(SPREAD * (noise + method.prior * likeness))

    def _generator(self, device: torch.device, step: int) -> torch.Generator:
        """Return a generator of this weight's noise at a step: nothing has to be kept of it, and no pass disturbs another."""
        number = (self._seed * 1_000_003 + step + 1) * 100_003 + self._index
        return torch.Generator(device).manual_seed(number % 2**63)

    def soft(self) -> Tensor:
        """Return the mask of the step, in (0, 1), (experts or 1, out, in)."""
        noise = torch.empty_like(self.logits, requires_grad=False)
        noise.exponential_(generator=self._generator(noise.device, self.step)).clamp_min_(torch.finfo(noise.dtype).tiny)
        y = ((self.scale * self.logits - noise.log_()) / self.temperature).softmax(-1)
        return (y @ self.candidates).flatten(-2)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the best candidates, exact zeros and ones, (experts or 1, out, in)."""
        return self.candidates[self.logits.argmax(-1)].flatten(-2)

    def forward(self, w: Tensor) -> Tensor:
        mask = self.soft() if self.training else self.hard()
        return w * self._weight.stored(mask).to(w.dtype)


def candidates(n: int, m: int) -> Tensor:
    """Return all masks of ``n`` kept of ``m``, float32 (C(m, n), m), in lexicographic order.

    >>> candidates(1, 2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    kept = list(itertools.islice(itertools.combinations(range(m), n), 1001))
    if len(kept) > 1000:
        raise GossamerError(f"{n}:{m} has more than 1000 masks a group to choose from: MaskLLM wants a smaller group")
    return torch.zeros(len(kept), m).scatter_(1, torch.tensor(kept), 1.0)


def _dense(weights: list[Weight], how: How) -> dict[Weight, Tensor]:
    """Return the weights to choose from."""
    if how.teacher is not None:
        theirs = dict(how.teacher.named_parameters(remove_duplicate=False))
        for weight in weights:
            if weight.name not in theirs or theirs[weight.name].shape != weight.parameter.shape:
                raise GossamerError(f"the teacher has no {weight.name} of shape {tuple(weight.parameter.shape)}")
        return {weight: theirs[weight.name].detach() for weight in weights}
    for weight in weights:
        if int((weight.parameter == 0).sum()) > weight.parameter.numel() // 8:
            raise GossamerError(
                f"{weight.name} is pruned, and MaskLLM chooses among dense weights: give teacher=, the dense model"
            )
    return {weight: weight.parameter.detach() for weight in weights}
