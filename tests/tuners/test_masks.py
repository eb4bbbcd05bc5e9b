"""AST, CAST and MaskLLM in every loop: exact zeros and plain in the end, resumed bit for bit, refused before a change."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import GossamerError
from tests.sites.families import causal, ids
from tests.tuners.loops import adamw, check_plain, equal, loss_of, packs, train, trainer

METHODS = ["AST(every=2)", "CAST(every=2)", "MaskLLM"]
RATES = {"AST(every=2)": 1e-3, "CAST(every=2)": 1e-3, "MaskLLM": 1e-2}


@pytest.fixture
def dense(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama().train()


@pytest.fixture
def pruned(dense: Any) -> Any:
    model = copy.deepcopy(dense)
    gossamer.prune(model, "SparseGPT", "2:4", data=ids(seed=9), progress=False)
    return model.train()


@pytest.mark.parametrize("start", ["dense", "pruned"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_of_ones_own(method: str, start: str, dense: Any, pruned: Any) -> None:
    model = copy.deepcopy({"dense": dense, "pruned": pruned}[start])
    flags = [p.requires_grad for p in model.parameters()]
    model.lm_head.weight.requires_grad_(False)
    head = model.lm_head.weight.detach().clone()
    tuning = gossamer.tune(model, method, "2:4", steps=30, teacher=dense)
    optimizer = adamw(tuning, RATES[method])
    tuning.attach(optimizer)
    before = float(loss_of(model.eval()).detach())
    losses = train(tuning.model.train() and tuning, optimizer, 30, passes=2)
    assert losses[-1] < losses[0]
    finished = tuning.finish()
    assert finished is model
    check_plain(model)
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not model.lm_head.weight.requires_grad
    assert len(flags) == len(list(model.parameters()))
    assert torch.equal(model.lm_head.weight, head) == (method == "MaskLLM")
    assert float(loss_of(model.eval()).detach()) < before
    train_free = torch.optim.SGD(model.parameters(), lr=0.0)
    loss_of(model).backward()
    train_free.step()  # no hook of ours is in the model, and none of it is missing
    packs(model)


@pytest.mark.parametrize("method", ["AST(every=2)", "MaskLLM"])
def test_what_is_finished_is_what_ran(method: str, dense: Any) -> None:
    tuning = gossamer.tune(dense, method, "2:4", steps=5)
    optimizer = adamw(tuning)
    tuning.attach(optimizer)
    train(tuning, optimizer, 5)
    before = tuning.model.eval()(ids()).logits
    assert torch.allclose(tuning.finish()(ids()).logits, before, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_goes_on_with_the_same_bits(method: str, pruned: Any, dense: Any, tmp_path: Path) -> None:
    def begin() -> Any:
        tuning = gossamer.tune(copy.deepcopy(pruned), method, "2:4", steps=9, teacher=dense)
        optimizer = adamw(tuning)
        return tuning.attach(optimizer), optimizer

    whole, optimizer = begin()
    train(whole, optimizer, 9)

    half, optimizer = begin()
    train(half, optimizer, 3)
    torch.save({"tuning": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    train(half, optimizer, 1)  # the state that was saved does not move with it
    state = torch.load(tmp_path / "state")
    again, optimizer = begin()
    again.load_state_dict(state["tuning"])
    optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(1)
    train(again, optimizer, 6)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert equal(whole.finish(), again.finish())

    wrong = dict(list(state["tuning"].items())[1:])
    fresh, _ = begin()
    held = fresh.state_dict()
    with pytest.raises(GossamerError, match="this state is of another tuning"):
        fresh.load_state_dict(wrong)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in held.items())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("method", METHODS)
def test_trainer(method: str, optim: str, dense: Any, pruned: Any, tmp_path: Path) -> None:
    tuning = gossamer.tune(pruned, method, "2:4", steps=4, teacher=dense)
    ours = trainer(tuning.model, tmp_path, optim=optim)
    tuning.attach(ours.create_optimizer())
    with gossamer.distill(tuning.model, dense) as loss:
        ours.compute_loss_func = loss
        ours.train()
    assert int(tuning.state_dict()["steps"]) == 4
    check_plain(tuning.finish())


@pytest.mark.parametrize("method", METHODS)
def test_trainer_resumes_bit_for_bit(method: str, dense: Any, pruned: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    def begin(**more: Any) -> Any:
        tuning = gossamer.tune(copy.deepcopy(pruned), method, "2:4", steps=4, teacher=dense)
        ours = trainer(tuning.model, tmp_path, **more)
        return tuning.attach(ours.create_optimizer()), ours

    class Save(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.save(whole.state_dict(), tmp_path / f"checkpoint-{state.global_step}" / "tuning.pt")

    whole, ours = begin(save_strategy="steps", save_steps=2)
    ours.add_callback(Save())
    ours.train()
    again, ours = begin()
    again.load_state_dict(torch.load(tmp_path / "checkpoint-2" / "tuning.pt"))
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(whole.finish(), again.finish())


@pytest.mark.parametrize("method", METHODS)
def test_accelerate(method: str, dense: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import GradientState

    GradientState._reset_state()  # which the Trainer leaves behind
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    tuning = gossamer.tune(dense, method, "2:4", steps=2)
    model, optimizer = accelerator.prepare(tuning.model, adamw(tuning))
    tuning.attach(optimizer)
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            optimizer.step()
            optimizer.zero_grad()
    assert int(tuning.state_dict()["steps"]) == 2
    check_plain(tuning.finish())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the method's name, by the release
@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_sees_the_same_mask(method: str, dense: Any) -> None:
    tuning = gossamer.tune(dense, method, "2:4", steps=4)
    loss_of(dense).backward()
    expected = [p.grad.clone() for p in tuning.parameters()]
    dense.zero_grad()
    dense.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(dense).backward()
    assert all(torch.allclose(p.grad, g, atol=1e-7) for p, g in zip(tuning.parameters(), expected, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])  # stored (in, out); stacked experts
@pytest.mark.parametrize("method", METHODS)
def test_other_layouts(method: str, family: str) -> None:
    model = causal(family).train()
    tuning = gossamer.tune(model, method, "2:4", steps=4)
    optimizer = adamw(tuning)
    tuning.attach(optimizer)
    train(tuning, optimizer, 4)
    check_plain(tuning.finish())


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().to(torch.bfloat16).train()
    tuning = gossamer.tune(model, method, "2:4", steps=4)
    optimizer = adamw(tuning, 1e-2)
    tuning.attach(optimizer)
    train(tuning, optimizer, 4)
    check_plain(tuning.finish())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tie", ["module", "parameter"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_shared_is_one_weight(method: str, tie: str, dense: Any) -> None:
    first, second = (layer.mlp for layer in dense.model.layers)
    if tie == "module":
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight = first.up_proj.weight
    tuning = gossamer.tune(dense, method, "2:4", steps=4)
    optimizer = adamw(tuning)
    tuning.attach(optimizer)
    train(tuning, optimizer, 4)
    tuning.finish()
    assert first.up_proj.weight is second.up_proj.weight
    check_plain(dense)


@pytest.mark.parametrize("method", ["AST", "CAST"])
@pytest.mark.parametrize("pattern", ["1:2", "Unstructured", "4x4", "NM(4, 8)"])
def test_other_patterns(method: str, pattern: str, dense: Any) -> None:
    takes = pattern in ("Unstructured", "4x4")
    tuning = gossamer.tune(dense, method, pattern, steps=2, sparsity=0.5 if takes else None)
    optimizer = adamw(tuning)
    tuning.attach(optimizer)
    train(tuning, optimizer, 2)
    weight = tuning.finish().model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == 0.5


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    return [(n, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(method: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(intermediate_size=66)
    before = state_of(model)
    with pytest.raises(GossamerError, match=r"^model.layers.0.mlp.down_proj.weight: the pattern 2:4 needs an input dimension"):
        gossamer.tune(model, method, "2:4", steps=4)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(GossamerError, match=r"up_proj.weight: 1 of .* NaN"):
        gossamer.tune(model, method, "2:4", steps=4, targets="*.up_proj")
    after = state_of(model)
    assert [(n, f) for n, _, f in before] == [(n, f) for n, _, f in after]
    check = [
        torch.equal(a, b) or n == "model.layers.1.mlp.up_proj.weight"
        for (n, a, _), (_, b, _) in zip(before, after, strict=True)
    ]
    assert all(check)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_tuning_and_another_optimizer_are_refused(method: str, dense: Any) -> None:
    tuning = gossamer.tune(dense, method, "2:4", steps=4)
    with pytest.raises(GossamerError, match="reparametrized already"):
        gossamer.tune(dense, method, "2:4", steps=4)
    with pytest.raises(GossamerError, match=r"does not update .* make it of tuning.parameters\(\)"):
        tuning.attach(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(GossamerError, match="not a Llama"):
        tuning.attach(dense)
    if method != "MaskLLM":
        with pytest.raises(GossamerError, match="SGD is no such optimizer"):
            tuning.attach(torch.optim.SGD(tuning.parameters()))
        with pytest.raises(GossamerError, match="Adam is no such optimizer"):
            tuning.attach(torch.optim.Adam(tuning.parameters(), weight_decay=0.1))
        optimizer = adamw(tuning)
        tuning.attach(optimizer)
        with pytest.raises(GossamerError, match="step without one"):
            optimizer.step(lambda: 0.0)
