"""Training in which Adam is steered: a mask follows the magnitudes, and what is outside of it is led to zero."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gossamer.core.errors import GossamerError
from gossamer.core.tuner import How, Tuning
from gossamer.tuners._weights import Weight, plain, restore, scaled, trainable, weights_of


class Layer(nn.Module):
    """What stands for a weight in the forward pass. Its mask is bool, of the weight's shape, True = kept."""

    mask: Tensor

    def __init__(self, weight: Weight, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    @abstractmethod
    def folded(self, w: Tensor) -> Tensor:
        """Return the final weight: exactly zero where the mask is False."""


class Method(Protocol):
    """What a method says of itself: how the weight is used, and what Adam is to follow in place of its first moment."""

    @property
    def every(self) -> int: ...

    def layer(self, weight: Weight, mask: Tensor) -> Layer: ...

    def moment(self, m: Tensor, v: Tensor, w: Tensor, mask: Tensor, step: int, steps: int) -> Tensor: ...


class Steered(Tuning):
    """All parameters in training, the mask taken anew every few steps, and Adam steered by the method's moment.

    ``soft`` tells that the forward pass is not masked, so that the last mask is that of the last weights.
    """

    def __init__(self, model: nn.Module, how: How, method: Method, *, soft: bool = False) -> None:
        self.model, self._how, self._method, self._soft = model, how, method, soft
        self._steps, self._hooks = 0, list[RemovableHandle]()
        weights = weights_of(model, how)
        self._layers = {weight: method.layer(weight, weight.mask(how)) for weight in weights}
        for weight, layer in self._layers.items():
            weight.parametrize(layer.train(model.training))
        self._frozen = [parameter for parameter in trainable(model) if not parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_()

    def parameters(self) -> list[nn.Parameter]:
        return list(trainable(self.model))

    def attach(self, optimizer: Optimizer) -> Self:
        optimizer = plain(optimizer, [weight.parameter for weight in self._layers])
        if not isinstance(optimizer, torch.optim.Adam) or any(map(_unfit, optimizer.param_groups)):
            raise GossamerError(
                f"{self._method!r} steers the moments of torch's AdamW (or Adam without weight decay), not maximizing; "
                f"{type(optimizer).__name__} is no such optimizer"
            )
        self._release()
        steering = Steering(optimizer, {weight.parameter: self._moment(weight) for weight in self._layers})
        self._hooks = [
            optimizer.register_step_pre_hook(steering.before),
            optimizer.register_step_post_hook(steering.after),
            optimizer.register_step_post_hook(self._after),
        ]
        return self

    def _moment(self, weight: Weight) -> Any:
        layer = self._layers[weight]
        return lambda m, v: self._method.moment(m, v, weight.parameter, layer.mask, self._steps, self._how.steps)

    def _after(self, *_: Any) -> None:
        self._steps += 1
        if self._steps % self._method.every == 0:
            self._take_masks()

    def _take_masks(self) -> None:
        for weight, layer in self._layers.items():
            layer.mask.copy_(weight.mask(self._how))

    def finish(self) -> nn.Module:
        if self._soft:
            self._take_masks()
        self._release()
        with torch.no_grad():
            for weight, layer in self._layers.items():
                weight.finish(layer.folded(weight.parameter))
        self._layers = {}
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        return self.model

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._tensors().items()} | {"steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        restore(self._tensors(), {name: tensor for name, tensor in state.items() if name != "steps"})
        self._steps = int(state["steps"])

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"weight.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        return weights | {f"mask.{weight.name}": layer.mask for weight, layer in self._layers.items()}


class Steering:
    """Hooks by which Adam follows another first moment ũ = f(m, v̂), of which its second moment is made too.

        m ← β₁m + (1 − β₁)g,  ũ = f(m, v̂),  v ← β₂v + (1 − β₂)ũ²,  W ← W − η m̂(ũ) / (√v̂ + ε)

    What is accumulated in m is the gradient alone. No step is computed here: where moment and gradient both are ũ, Adam's next
    moment is β₁ũ + (1 − β₁)ũ = ũ, and its step the one that is wanted; afterwards m is put back. At the first step there is no
    moment to steer and the step is Adam's own.
    """

    def __init__(self, optimizer: torch.optim.Adam, moments: Mapping[nn.Parameter, Any]) -> None:
        self._optimizer, self._moments = optimizer, moments
        self._true: dict[nn.Parameter, Tensor] = {}
        self._first: list[tuple[nn.Parameter, float]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise GossamerError("a closure makes gradients within the step, after they were to be seen: step without one")
        if scaled(self._optimizer):
            raise GossamerError("gradients are scaled until the step: use bfloat16, or an optimizer with fused=False")
        for group in self._optimizer.param_groups:
            beta, gamma = map(float, group["betas"])
            for parameter in group["params"]:
                if parameter.grad is None or parameter not in self._moments:
                    continue
                state = self._optimizer.state.get(parameter)
                if not state:
                    self._first.append((parameter, beta))
                    continue
                moment = state["exp_avg"].lerp_(parameter.grad, 1 - beta)
                self._true[parameter] = moment.clone()
                second = state["exp_avg_sq"] / (1 - gamma ** float(state["step"]))
                moment.copy_(self._moments[parameter](moment, second))
                parameter.grad.copy_(moment)

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        for parameter, moment in self._true.items():
            self._optimizer.state[parameter]["exp_avg"].copy_(moment)
        for parameter, beta in self._first:  # Adam made v of g, and m = (1 − β₁)g
            self._optimizer.state[parameter]["exp_avg_sq"].mul_((1 - beta) ** 2)
        self._true, self._first = {}, []


def _unfit(group: Mapping[str, Any]) -> bool:
    coupled = group["weight_decay"] and not group.get("decoupled_weight_decay")
    return bool(coupled or group.get("maximize"))
