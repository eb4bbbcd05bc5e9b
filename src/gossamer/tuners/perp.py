"""PERP: after pruning, only the biases, the norms or the head are trained again."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from gossamer.core.errors import GossamerError
from gossamer.core.spec import spec
from gossamer.core.tuner import How, Tuner, Tuning
from gossamer.sites.holding import Hold, hold

PARTS = ("bias", "norm", "head")


@spec
class PERP(Tuner):
    """Train only some parts of a pruned model: its biases (of norms too), its norms, its head; W' = W for every other weight.

    A head that shares the embedding's matrix trains that. Nothing is added, and nothing has to be merged; should a trained part
    have zeros of its own, they are held.

    Args:
        parts: "bias", "norm", "head", or several of them with commas between; None for the biases and norms that there are.

    Raises:
        GossamerError: another part, or one that the model has none of.

    Source: PERP (Zimmer et al., 2023, arXiv:2312.15230).

    >>> PERP(parts="norm,head")
    PERP(parts='norm,head')
    """

    rate: ClassVar[float] = 1e-3
    parts: str | None = None

    def __post_init__(self) -> None:
        unknown = [part for part in self._chosen if part not in PARTS]
        if unknown or not self._chosen:
            raise GossamerError(f"PERP trains parts, of {', '.join(PARTS)}; not {self.parts!r}")

    @property
    def _chosen(self) -> list[str]:
        return [part.strip() for part in ("bias,norm" if self.parts is None else self.parts).split(",") if part.strip()]

    def start(self, model: nn.Module, how: How) -> Tuning:
        if how.targets is not None:
            raise GossamerError("PERP trains parts, not weights: leave targets= out, and say parts=")
        chosen: dict[str, nn.Parameter] = {}
        for part in self._chosen:
            if not (found := _parameters(model, part)) and (self.parts is not None or (part == "norm" and not chosen)):
                has = [other for other in PARTS if _parameters(model, other)]
                raise GossamerError(
                    f"{type(model).__name__} has no {part} to train; it has: {', '.join(has) or 'none of the parts'}"
                )
            chosen |= found
        return _Parts(model, chosen)


def _parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a part by name; a norm is a module that is called one."""
    everything = dict(model.named_parameters())
    if part == "bias":
        return {name: p for name, p in everything.items() if name.rpartition(".")[2] == "bias"}
    if part == "norm":
        norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
        return {name: p for name, p in everything.items() if name.rpartition(".")[0] in norms}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    return {name: p for name, p in everything.items() if id(p) in of_head}


class _Parts(Tuning):
    def __init__(self, model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
        self.model, self._chosen = model, chosen
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        own = {id(p) for p in chosen.values()}
        for parameter, _ in self._trained:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in own)
        self._held: Hold | None = None

    def parameters(self) -> list[nn.Parameter]:
        return list(self._chosen.values())

    def attach(self, optimizer: Optimizer) -> Self:
        pruned = [name for name, p in self._chosen.items() if p.ndim > 1 and not bool(p.detach().all())]
        if pruned:
            self._held = hold(self.model, optimizer, targets=",".join(pruned))
        return self

    def finish(self) -> nn.Module:
        if self._held is not None:
            self._held.release()
            self._held.check()
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._chosen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if differing := sorted(set(state) ^ set(self._chosen)):
            raise GossamerError(f"this state is of other parts: {differing[0]} is in one and not in the other")
        for name, parameter in self._chosen.items():
            parameter.data.copy_(state[name])
