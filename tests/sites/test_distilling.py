"""Distillation: the loss by hand, what counts, and that any trainer takes it and leaves both models as they should be."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer import GossamerError
from tests.sites.families import causal, ids


@pytest.fixture
def pair(tiny_llama: Any) -> tuple[Any, Any]:
    """A pruned student in training mode, and the dense teacher it was."""
    teacher = tiny_llama()
    student = copy.deepcopy(teacher).train()
    gossamer.prune(student, "Magnitude", "2:4")
    return student, teacher


def by_hand(student: Any, teacher: Any, tokens: Tensor, kept: Tensor, temperature: float) -> dict[str, Tensor]:
    """Return the three terms as their formulas say, position by position."""
    ours = student(tokens, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(tokens, output_hidden_states=True)
    ce, kl, count = torch.zeros(()), torch.zeros(()), 0
    for b, i in kept.nonzero().tolist():
        p = (theirs.logits[b, i] / temperature).softmax(-1)
        q = (ours.logits[b, i] / temperature).softmax(-1)
        kl = kl + temperature**2 * (p * (p.log() - q.log())).sum()
        ce = ce - ours.logits[b, i].log_softmax(-1)[tokens[b, i + 1]]
        count += 1
    square = torch.zeros(())
    for h, t in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        square = square + ((h - t)[kept] ** 2).mean() / (t[kept] ** 2).mean()
    return {"task": ce / count, "logits": kl / count, "hidden": square}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_sum_of_its_three_terms(pair: Any, temperature: float) -> None:
    student, teacher = pair
    with torch.no_grad():  # what comes before the first block differs too, and is not in the sum
        student.get_input_embeddings().weight.mul_(1.5)
    tokens = ids(3, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    labels[2, 6:] = -100
    kept = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    wanted = by_hand(student, teacher, tokens, kept, temperature)
    with gossamer.distill(student, teacher, task=0.5, logits=2.0, hidden=3.0, temperature=temperature) as loss:
        found = loss(student(tokens), labels)
    torch.testing.assert_close(loss.parts, {k: v.detach() for k, v in wanted.items()}, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, 0.5 * wanted["task"] + 2 * wanted["logits"] + 3 * wanted["hidden"], rtol=1e-4, atol=1e-6)
    assert min(float(v.detach()) for v in wanted.values()) > 1e-3


def test_a_student_that_is_its_teacher_has_only_the_tasks_loss(tiny_llama: Any) -> None:
    student, tokens = tiny_llama().train(), ids()
    with gossamer.distill(student, tiny_llama()) as loss:
        found = loss(student(tokens), tokens)
    torch.testing.assert_close(found, student(tokens, labels=tokens).loss)


def test_terms_of_weight_nothing_are_not_computed(pair: Any) -> None:
    student, teacher = pair
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    with gossamer.distill(student, teacher, logits=0, hidden=0) as loss:
        output = student(ids())
        loss(output, ids())
    assert (calls, list(loss.parts), output.hidden_states) == ([], ["task"], None)
    with gossamer.distill(student, teacher, task=0, hidden=0) as loss:
        loss(student(ids()))
    assert (calls, list(loss.parts)) == ([1], ["logits"])


def test_padding_changes_nothing(pair: Any) -> None:
    student, teacher = pair
    tokens, more = ids(2, 8), torch.nn.functional.pad(ids(2, 8), (0, 3), value=5)
    attended = torch.nn.functional.pad(torch.ones(2, 8, dtype=torch.long), (0, 3))
    with gossamer.distill(student, teacher, task=0) as loss:
        plain = loss(student(tokens))
        padded = loss(student(more, attention_mask=attended))
        everything = loss(student(more))
    torch.testing.assert_close(padded, plain)
    assert not torch.allclose(everything, plain)


def test_several_passes_of_a_step_add_up_to_one(pair: Any) -> None:
    student, teacher = pair
    tokens = ids(4, 8)
    with gossamer.distill(student, teacher, hidden=0) as loss:  # a ratio of sums does not add up
        loss(student(tokens), tokens).backward()
        whole = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        student.zero_grad()
        for part in tokens.split(2):
            loss(student(part), part, num_items_in_batch=tokens.numel()).backward()
    # Trainer counts every label, the mean only those that are predicted: 7 of 8
    for one, other in zip(whole, (p.grad for p in student.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(other / other.norm(), one / one.norm(), rtol=1e-3, atol=1e-4)


def test_evaluation_gives_the_tasks_loss(pair: Any) -> None:
    student, teacher = pair
    with gossamer.distill(student, teacher) as loss:
        student.eval()
        found = loss(student(ids()), ids())
        torch.testing.assert_close(found, student(ids(), labels=ids()).loss)


def test_the_teacher_learns_nothing_and_release_leaves_no_hook(pair: Any) -> None:
    student, teacher = pair
    before = copy.deepcopy(teacher.state_dict())
    with gossamer.distill(student, teacher) as loss:
        loss(student(ids()), ids()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not student._forward_pre_hooks
    assert student(ids()).hidden_states is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_a_pruned_model_comes_nearer_to_its_teacher(family: str) -> None:
    teacher = causal(family, initializer_range=0.2)
    student = copy.deepcopy(teacher).train()
    gossamer.prune(student, "Magnitude", "2:4")
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    with gossamer.distill(student, teacher, task=0) as loss:
        for _ in range(25):
            found = loss(student(ids()))
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(found.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_trainer_takes_it(pair: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    student, teacher = pair
    rows = [{"input_ids": row, "labels": row} for row in ids(16)]
    settings = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-3, use_cpu=True, report_to=[], dataloader_pin_memory=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with gossamer.distill(student, teacher) as loss:
        trainer = Trainer(student, settings, train_dataset=rows, eval_dataset=rows, compute_loss_func=loss)
        trainer.train()
        assert sorted(loss.parts) == ["hidden", "logits", "task"]
        assert trainer.evaluate()["eval_loss"] < trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"task": -1.0}, "not negative"),
        ({"task": 0, "logits": 0, "hidden": 0}, "not all of them 0"),
        ({"temperature": 0.0}, "more than 0"),
    ],
)
def test_what_cannot_be_is_refused(pair: Any, change: dict[str, float], told: str) -> None:
    with pytest.raises(GossamerError, match=told):
        gossamer.distill(*pair, **change)
    assert not pair[0]._forward_pre_hooks


def test_a_teacher_of_another_size_is_refused(pair: Any, tiny_llama: Any) -> None:
    student, _ = pair
    with pytest.raises(GossamerError, match="differ in num_hidden_layers: 2 and 3"):
        gossamer.distill(student, tiny_llama(num_hidden_layers=3))
    with pytest.raises(GossamerError, match="the student itself"):
        gossamer.distill(student, student)


def test_a_loss_without_a_forward_pass_is_refused(pair: Any) -> None:
    student, teacher = pair
    with gossamer.distill(student, teacher) as loss:
        output = student(ids())
        loss(output, ids())
        with pytest.raises(GossamerError, match="has not run since"):
            loss(output, ids())
        with pytest.raises(GossamerError, match="no loss of the task"):
            loss(student(ids()))
