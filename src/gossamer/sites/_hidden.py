"""The width of the hidden states: every weight that reads or writes them, and all of these taken into another basis at once.

    W_in ← W_in · diag(g) · Q        W_out ← Qᵀ · W_out        E ← E · Q        H ← H · diag(g) · Q

for the linears that read the hidden states behind a norm of gain g, those that write to them, the embeddings and the head. A
norm that only divides by the root mean square does the same to x and to xQ, if Q is square and orthogonal; with fewer columns Q
also makes the model narrower.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError
from gossamer.sites._coupling import couplings, is_transposed, tell_sizes
from gossamer.sites._walk import blocks_of, text_config

SIZES = ("hidden_size", "embed_dim", "embedding_dim", "normalized_shape")  # what modules call it


@dataclass(frozen=True, eq=False)
class Hidden:
    """Everything that holds the width of a model's hidden states.

    Attributes:
        width: how wide they are.
        readers: each linear that reads them, with the norm it reads them through; the head among them.
        writers: the linears that add to them.
        norms: the norms, with the number that is added to their weight to make the gain.
        embeddings: what makes the first ones.
    """

    width: int
    readers: Mapping[Any, Any]
    writers: Sequence[Any]
    norms: Mapping[Any, float]
    embeddings: Any

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, batch: Mapping[str, Tensor]) -> "Hidden":
        """Find them: by the coupling table, and by which norm's output comes to which linear.

        Raises:
            GossamerError: something reads or writes the hidden states in a way that has no place in this.
        """
        name, width = type(model).__name__, int(text_config(model).hidden_size)
        blocks = blocks_of(model)[1]
        found = [coupling for kind in ("heads", "channels") for coupling in couplings(model, blocks, kind)]
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None or not isinstance(embeddings, nn.Embedding):
            raise GossamerError(f"{name} has no plain head and embeddings, so its hidden states cannot be made narrower")
        reading = [*(part.module for coupling in found for part in coupling.parts[:-1]), head]
        writing = [coupling.out for coupling in found]
        wide = {n: m for n, m in model.named_modules() if any(width in p.shape for p in m.parameters(recurse=False))}
        norms = [m for m in wide.values() if [tuple(p.shape) for p in m.parameters(recurse=False)] == [(width,)]]
        for at, module in wide.items():
            if module not in (*reading, *writing, *norms, embeddings):
                raise GossamerError(f"{name}: {at} has the width of the hidden states, and is no norm or linear that is known")
        made: list[tuple[Any, Tensor]] = []
        came: dict[Any, Tensor] = {}
        hooks = [norm.register_forward_hook(lambda m, _, out: made.append((m, out))) for norm in norms]
        hooks += [m.register_forward_pre_hook(lambda m, args: came.update({m: args[0]})) for m in reading]
        try:
            model(**{key: value[:1] for key, value in batch.items()}, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        place = lambda x: x.untyped_storage().data_ptr()  # noqa: E731 (the head may get a slice)
        by_place = {place(out): norm for norm, out in made}
        readers = {m: by_place.get(place(came[m])) if m in came else None for m in reading}
        if None in readers.values() or set(readers.values()) != set(norms):
            raise GossamerError(f"{name} does not read its hidden states through one norm each time, so they cannot be rotated")
        return cls(width, readers, writing, {norm: _offset(name, norm, width) for norm in norms}, embeddings)

    @torch.no_grad()
    def project(self, model: Any, q: Tensor) -> None:
        """Take all of them to the basis Q, (width, narrower), with orthonormal columns.

        A norm of narrower states divides by the root mean square of fewer entries: its gain √(width/narrower) makes up for it.
        """
        narrow, q = q.shape[1], q.double()
        for reader, norm in self.readers.items():
            gain = norm.weight.double() + self.norms[norm]
            w = _matrix(reader).double() * gain
            _put(reader, w @ q.to(w.device))
        for writer in self.writers:
            w = _matrix(writer).double()
            _put(writer, q.T.to(w.device) @ w)
            if writer.bias is not None:
                writer.bias = _parameter(writer.bias, q.T.to(w.device) @ writer.bias.double())
        table = self.embeddings.weight  # once tied, it has to part from the head here, which has a norm's gain in it
        self.embeddings.weight = _parameter(table, table.double() @ q.to(table.device))
        for norm, offset in self.norms.items():
            norm.weight = _parameter(norm.weight, torch.full((narrow,), math.sqrt(self.width / narrow) - offset))
        for module in model.modules():
            for name in SIZES:
                if getattr(module, name, None) == self.width:
                    setattr(module, name, narrow)
                elif getattr(module, name, None) == (self.width,):
                    setattr(module, name, (narrow,))


def _offset(model: str, norm: Any, width: int) -> float:
    """Return what a norm adds to its weight to make its gain.

    Raises:
        GossamerError: it is another function than x · gain / √(mean x² + ε), ε small.
    """
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(norm.weight)
    x = 100 * (x + 0.5)  # so that ε is nothing, and that a norm that took the mean away would show
    plain = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    for offset in (0.0, 1.0):
        wanted = plain * (norm.weight.double() + offset)
        if torch.allclose(norm(x).double(), wanted, rtol=0, atol=8 * torch.finfo(x.dtype).eps * float(wanted.abs().max())):
            return offset
    raise GossamerError(f"{model} has norms that do more than divide by the root mean square, so its states cannot be rotated")


def _matrix(linear: Any) -> Tensor:
    """Return a linear's weight as (out, in)."""
    weight: Tensor = linear.weight.data
    return weight.T if is_transposed(linear) else weight


def _put(linear: Any, w: Tensor) -> None:
    linear.weight = _parameter(linear.weight, w.T if is_transposed(linear) else w)
    tell_sizes(linear)


def _parameter(like: Any, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.to(like).contiguous(), requires_grad=like.requires_grad)
