"""Holding the zeros: what is lost without it stays with it, whatever trains the model."""

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.core.errors import GossamerError
from tests.sites.families import causal, ids

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Everywhere(torch.optim.Optimizer):
    """Writes to every entry, wherever the gradient is zero."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


def transformers_adafactor(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers import Adafactor

    return Adafactor(params, lr=1e-2, beta1=0.9, relative_step=False, scale_parameter=False)


def eight_bit(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adafactor-transformers": transformers_adafactor,
    "muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3),
    "everywhere": Everywhere,
    "adamw-8bit": eight_bit,
}


@pytest.fixture
def pruned(tiny_llama: Callable[..., Any]) -> Any:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.5)
    return model.train()


def linears(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "layers." in n and p.ndim > 1}


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in linears(model).items()}


def lost(model: nn.Module, before: dict[str, Tensor]) -> int:
    return sum(int(((p != 0) & before[name]).sum()) for name, p in linears(model).items())


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    data = ids(seed=seed)
    return model(input_ids=data, labels=data).loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, first: int = 0) -> None:
    for step in range(first, first + steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def entries_of_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Return what the optimizer keeps for each single entry of the parameter; 8-bit codes as what they stand for."""
    state, found = optimizer.state[parameter], []
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            if value.dtype == torch.uint8:
                value = state[f"qmap{name[-1]}"][value.long()]
                value = torch.where(value.abs() < 1e-4, 0, value)  # of the largest of 256: no code is nearer to 0 than 2e-5
            found.append(value)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(pruned: Any, name: str) -> None:
    before, free = zeros(pruned), copy.deepcopy(pruned)
    train(free, OPTIMIZERS[name](free.parameters()))
    assert lost(free, before) > 1000  # without the hold

    start = {n: p.detach().clone() for n, p in linears(pruned).items()}
    optimizer = OPTIMIZERS[name](pruned.parameters())
    held = gossamer.hold(pruned, optimizer)
    train(pruned, optimizer)
    assert lost(pruned, before) == 0
    assert held.check().recipe["steps"] == 3
    for n, p in linears(pruned).items():
        assert (p != start[n])[~before[n]].float().mean() > 0.9  # kept weights are trained
        assert all(int(value[before[n]].count_nonzero()) == 0 for value in entries_of_state(optimizer, p))


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw-foreach", "adamw-fused", "adafactor"])
def test_state_of_pruned_entries_is_there_without_the_hold(pruned: Any, name: str) -> None:
    before, optimizer = zeros(pruned), OPTIMIZERS[name](pruned.parameters())
    train(pruned, optimizer)
    states = [(n, value) for n, p in linears(pruned).items() for value in entries_of_state(optimizer, p)]
    assert all(int(value[before[n]].count_nonzero()) > 0 for n, value in states)
    assert bool(states) == (name != "adafactor")  # which keeps rows and columns only


def test_kept_weights_are_trained_as_by_masking_by_hand(pruned: Any) -> None:
    by_hand, before = copy.deepcopy(pruned), zeros(pruned)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-2)
    gossamer.hold(pruned, optimizer)
    train(pruned, optimizer)
    other = torch.optim.AdamW(by_hand.parameters(), lr=1e-2)
    for step in range(3):
        other.zero_grad()
        loss_of(by_hand, step).backward()
        for n, p in linears(by_hand).items():
            p.grad[before[n]] = 0
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), by_hand.parameters(), strict=True))


def test_clipping_sees_kept_entries_only_and_gradients_accumulate(pruned: Any) -> None:
    before, free = zeros(pruned), copy.deepcopy(pruned)
    gossamer.hold(pruned, torch.optim.AdamW(pruned.parameters()))
    for model in (free, pruned):
        for seed in (0, 1):
            loss_of(model, seed).backward()
    dense = float(nn.utils.get_total_norm([p.grad for p in free.parameters()]))
    for n, p in linears(free).items():
        assert int(p.grad[before[n]].count_nonzero()) > 0
        p.grad[before[n]] = 0
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(free.parameters(), pruned.parameters(), strict=True))
    seen = float(nn.utils.clip_grad_norm_(pruned.parameters(), 1e9))
    assert seen < 0.9 * dense
    assert seen == pytest.approx(float(nn.utils.get_total_norm([p.grad for p in free.parameters()])))


def test_gradients_written_by_hand_do_not_reach_the_state(pruned: Any) -> None:
    before, optimizer = zeros(pruned), torch.optim.AdamW(pruned.parameters())
    gossamer.hold(pruned, optimizer)
    for p in pruned.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for n, p in linears(pruned).items():
        assert all(int(value[before[n]].count_nonzero()) == 0 for value in entries_of_state(optimizer, p))


def test_gradients_that_a_closure_makes_within_the_step_do_not_reach_the_state(pruned: Any) -> None:
    before, optimizer = zeros(pruned), torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9)
    gossamer.hold(pruned, optimizer)

    def closure() -> Tensor:
        loss = loss_of(pruned)
        loss.backward()
        return loss

    optimizer.step(closure)
    for n, p in linears(pruned).items():
        assert int(optimizer.state[p]["momentum_buffer"][before[n]].count_nonzero()) == 0


def test_what_stands_in_the_state_is_masked(pruned: Any) -> None:
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9)
    train(pruned, optimizer)
    gossamer.prune(pruned, "Magnitude", "2:4")
    before = zeros(pruned)
    momenta = {n: optimizer.state[p]["momentum_buffer"] for n, p in linears(pruned).items()}
    assert all(int(momenta[n][mask].count_nonzero()) > 0 for n, mask in before.items())
    gossamer.hold(pruned, optimizer)
    train(pruned, optimizer, 1)
    assert all(int(momenta[n][mask].count_nonzero()) == 0 for n, mask in before.items())


def autocast(model: Any) -> Any:
    forward = model.forward

    def inside(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(**inputs)

    model.forward = inside
    return model


def checkpointed(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # to be renamed
        model.gradient_checkpointing_enable()
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("wrap", [autocast, checkpointed, compiled, lambda model: model.bfloat16()])
@pytest.mark.parametrize("first", [True, False])
def test_any_forward(pruned: Any, wrap: Callable[[Any], Any], first: bool) -> None:
    before = zeros(pruned)
    model = wrap(pruned)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    held = gossamer.hold(model if first else pruned, optimizer)
    train(model, optimizer)
    assert lost(pruned, before) == 0
    assert set(before) == {row["name"] for row in held.check().weights}
    held.release()
    train(model, optimizer)
    assert lost(pruned, before) > 1000


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])  # stored (in, out), and stacked
def test_other_layouts(family: str) -> None:
    model = causal(family).train()
    report = gossamer.prune(model, "Magnitude", "2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gossamer.hold(model, optimizer) as held:
        train(model, optimizer)
    columns = ("name", "shape", "sparsity", "nnz", "block")
    assert [[r[c] for c in columns] for r in held.check().weights] == [[r[c] for c in columns] for r in report.weights]


def test_resume_continues_bit_for_bit(pruned: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(pruned)
    weight = pruned.model.layers[0].mlp.up_proj.weight
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-2)
    held = gossamer.hold(pruned, optimizer)
    train(pruned, optimizer, 2)
    place = tuple(weight.detach().nonzero()[0])
    weight.data[place] = 0  # a kept weight that happens to be zero when the checkpoint is written
    states = {"model": pruned.state_dict(), "optimizer": optimizer.state_dict(), "hold": held.state_dict()}
    torch.save(states, tmp_path / "checkpoint.pt")
    train(pruned, optimizer, 2, first=2)
    assert weight[place] != 0  # kept is kept

    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for resumed in (True, False):
        again = copy.deepcopy(base)
        again.load_state_dict(states["model"])
        other = torch.optim.AdamW(again.parameters(), lr=1e-2)
        other.load_state_dict(states["optimizer"])
        holding = gossamer.hold(again, other)
        if resumed:
            holding.load_state_dict(states["hold"])
        train(again, other, 2, first=2)
        same = all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters(), strict=True))
        assert same == resumed  # masks read off the weights would have held the one zero more
        assert holding.check().recipe["steps"] == (4 if resumed else 2)


def test_masks_of_another_model_are_refused(pruned: Any, tiny_llama: Callable[..., Any]) -> None:
    held = gossamer.hold(pruned, torch.optim.AdamW(pruned.parameters()))
    name = "model.layers.0.mlp.up_proj.weight"
    masks = held.state_dict()["masks"]
    with pytest.raises(GossamerError, match=f"of another model: {name} is in one"):
        held.load_state_dict({"steps": 0, "masks": {n: m for n, m in masks.items() if n != name}})
    with pytest.raises(GossamerError, match=r"up_proj.weight has shape \(64, 32\), its mask \(64, 31\)"):
        held.load_state_dict({"steps": 0, "masks": {**masks, name: masks[name][:, 1:]}})
    with pytest.raises(GossamerError, match=r"up_proj.weight has 1,024 entries that its mask holds at zero"):
        held.load_state_dict({"steps": 0, "masks": {**masks, name: ~masks[name]}})
    assert all(torch.equal(mask, masks[n]) for n, mask in held.state_dict()["masks"].items())


def test_check_names_the_weights_that_lost_zeros(pruned: Any) -> None:
    optimizer = torch.optim.AdamW(pruned.parameters())
    held = gossamer.hold(pruned, optimizer)
    report = held.check()
    assert (report.kind, report.totals["sparsity"], report.recipe["steps"]) == ("hold", 0.5, 0)
    assert str(report).startswith("hold: 14 weights")
    weight = pruned.model.layers[1].mlp.down_proj.weight
    weight.data[weight == 0] = 1
    with pytest.raises(GossamerError, match=r"^1 of 14 held weights lost zeros: .*1.mlp.down_proj.weight \(1,024\);"):
        held.check()
    with pytest.raises(GossamerError, match="lost zeros"), held:
        pass  # leaving the block checks
    train(pruned, optimizer)
    assert "released" in repr(held)


def test_an_error_in_the_block_is_the_error_that_is_seen(pruned: Any) -> None:
    before, optimizer = zeros(pruned), torch.optim.AdamW(pruned.parameters(), lr=1e-2)

    def interrupted() -> None:
        with gossamer.hold(pruned, optimizer):
            pruned.model.layers[0].mlp.up_proj.weight.data.fill_(1)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    train(pruned, optimizer)
    assert lost(pruned, before) > 1000  # and the hooks are gone


def test_what_cannot_be_held_is_refused(pruned: Any, tiny_llama: Callable[..., Any]) -> None:
    dense = tiny_llama()
    with pytest.raises(GossamerError, match="none of the 14 weights has zeros to hold: prune the model first"):
        gossamer.hold(dense, torch.optim.AdamW(dense.parameters()))
    with pytest.raises(GossamerError, match="the optimizer updates none of the 14 pruned weights"):
        gossamer.hold(pruned, torch.optim.AdamW(dense.parameters()))
    with pytest.raises(GossamerError, match=r"hold wants a torch.optim.Optimizer, .* not a Llama"):
        gossamer.hold(pruned, pruned)


def test_weights_of_nothing_but_zeros_and_dense_ones_are_free(pruned: Any) -> None:
    layer = pruned.model.layers[0]
    layer.mlp.up_proj.weight.data.fill_(1)
    layer.self_attn.o_proj.weight.data.zero_()  # an adapter starts so; held, it would never learn
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=1e-2)
    assert repr(gossamer.hold(pruned, optimizer)) == "Hold(12 weights, sparsity 0.5000, AdamW, step 0)"
    train(pruned, optimizer)
    assert int((layer.self_attn.o_proj.weight == 0).sum()) == 0


def test_targets_are_named_as_in_prune(pruned: Any) -> None:
    optimizer = torch.optim.AdamW(pruned.parameters())
    assert len(gossamer.hold(pruned, optimizer, targets="*.mlp.*").check().weights) == 6
    with pytest.raises(GossamerError, match="none of the 1 weights has zeros"):
        gossamer.hold(pruned, optimizer, targets="lm_head")
    gossamer.prune(pruned, "Magnitude", "2:4", targets="lm_head")
    assert gossamer.hold(pruned, optimizer, targets="lm_head").check().totals["weights"] == 1


def test_two_optimizers_are_held_each(pruned: Any) -> None:
    before, matrices = zeros(pruned), list(linears(pruned).values())
    both = [torch.optim.Muon(matrices[:7], lr=1e-2), torch.optim.AdamW(matrices[7:], lr=1e-2)]
    holds = [gossamer.hold(pruned, optimizer) for optimizer in both]
    loss_of(pruned).backward()
    for optimizer in both:
        optimizer.step()
    assert [len(held.check().weights) for held in holds] == [7, 7]
    assert lost(pruned, before) == 0


def test_frozen_weights_are_held_once_they_are_trained(pruned: Any) -> None:
    before, optimizer = zeros(pruned), torch.optim.AdamW(pruned.parameters(), lr=1e-2)
    pruned.requires_grad_(False)
    gossamer.hold(pruned, optimizer)
    pruned.requires_grad_(True)
    train(pruned, optimizer)
    assert lost(pruned, before) == 0


def test_replaced_parameters_are_told(pruned: Any) -> None:
    optimizer = torch.optim.AdamW(pruned.parameters())
    gossamer.hold(pruned, optimizer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach()) for p in pruned.parameters()]
    with pytest.raises(GossamerError, match=r"no longer updates model.layers.0.self_attn.q_proj.weight: .* call hold after"):
        optimizer.step()
