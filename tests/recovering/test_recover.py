"""Recover: a directory in, a trained one with the same zeros out, whatever comes between."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.recovering import _loop
from gossamer.recovering._loop import Plan
from gossamer.recovering._state import State
from gossamer.sites._shrinking import shrink_checkpoint

SMALL: dict[str, Any] = {"steps": 6, "batch": 2, "seqlen": 16, "rate": 1e-3}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. The spider spins a thin thread; gossamer is light and strong.\n" for i in range(60)))
    return path


@pytest.fixture
def pruned(tiny_dir: Path, tmp_path: Path) -> Path:
    gossamer.prune_checkpoint(tiny_dir, tmp_path / "pruned", "Magnitude", "2:4", name=str(tiny_dir))
    return tmp_path / "pruned"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor == 0 for name, tensor in tensors(folder).items() if "proj" in name}


class Killed(BaseException):
    pass


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Recover with every state kept, until the one after some step is on disk."""

    def call(at: int, *args: Any, **how: Any) -> None:
        save = State.save

        def dies(self: State, step: int, *state: Any) -> None:
            save(self, step, *state)
            if step == at:
                raise Killed

        torch.manual_seed(at)  # whatever stands there, a run has random numbers of its own
        with monkeypatch.context() as patch:
            patch.setattr(State, "save", dies)
            with pytest.raises(Killed):
                gossamer.recover(*args, every=0, **how)

    return call


def test_the_zeros_stay_the_loss_falls_and_the_report_says_so(pruned: Path, text: Path, tmp_path: Path) -> None:
    out, random = tmp_path / "out", torch.get_rng_state()
    report = gossamer.recover(pruned, out, data=text, evaluate=text, eval_seqlen=16, **SMALL | {"steps": 20})
    before, after = zeros(pruned), zeros(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.kind == "recover"
    assert report.totals["sparsity"] == 0.5
    trained = report.training
    assert trained is not None
    assert len(trained["losses"]) == 20
    assert trained["losses"][-1] < trained["losses"][0]
    assert report.evaluation is not None
    assert report.evaluation["perplexity"] < trained["before"]
    assert trained["trainable"] == report.model["parameters"]
    assert report.recipe["pruned_by"] == "Magnitude"
    assert report.recipe["pattern"] == "2:4"
    assert torch.equal(random, torch.get_rng_state())  # the caller's own
    assert gossamer.Report.load(out / "report.json") == report
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    gossamer.pack(gossamer.load(out), "NM", pattern="2:4")


def test_a_killed_run_goes_on_to_the_same_bits(pruned: Path, text: Path, tmp_path: Path, kill: Any) -> None:
    whole = gossamer.recover(pruned, tmp_path / "whole", data=text, **SMALL)
    kill(3, pruned, tmp_path / "out", data=text, **SMALL)
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in (tmp_path / ".out.training").iterdir()) == ["lock", "step-3.safetensors", "training.json"]
    again = gossamer.recover(pruned, tmp_path / "out", data=text, **SMALL)
    assert again.training == whole.training
    ours, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert not (tmp_path / ".out.training").exists()


def test_blocks_are_reconstructed_and_a_killed_run_goes_on(pruned: Path, text: Path, tmp_path: Path, kill: Any) -> None:
    small = {"steps": 6, "batch": 2, "seqlen": 16}
    whole = gossamer.recover(
        pruned, tmp_path / "whole", "Reconstruct(epochs=4)", data=text, evaluate=text, eval_seqlen=16, **small
    )
    assert whole.blocks is not None
    assert [block["block"] for block in whole.blocks] == [0, 1]
    assert all(block["after"] < block["before"] for block in whole.blocks)
    blocks = gossamer.load(pruned).model.layers
    assert whole.training is not None
    assert whole.training["trainable"] == sum(p.numel() for p in blocks.parameters())
    kill(1, pruned, tmp_path / "out", "Reconstruct(epochs=4)", data=text, **small)
    again = gossamer.recover(pruned, tmp_path / "out", "Reconstruct(epochs=4)", data=text, **small)
    assert [block["after"] for block in again.blocks or []] == [block["after"] for block in whole.blocks]
    ours, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert all(torch.equal(zeros(pruned)[name], mask) for name, mask in zeros(tmp_path / "out").items())


@pytest.mark.filterwarnings("ignore:merging dropped:UserWarning")  # LoRAPrune's own
@pytest.mark.parametrize(
    "method", ["MaskLoRA(rank=4)", "ScaleLoRA", "LoRAPrune(rank=4)", "SPP", "PERP", "PST", "AST", "CAST", "MaskLLM"]
)
def test_every_way_of_training_goes_on_to_the_same_bits(
    pruned: Path, text: Path, tmp_path: Path, kill: Any, method: str
) -> None:
    chooses = {"pattern": "2:4"} if method in ("PST", "AST", "CAST", "MaskLLM") else {}
    how = SMALL | chooses | {"data": text, "method": method}
    whole = gossamer.recover(pruned, tmp_path / "whole", **how)
    kill(3, pruned, tmp_path / "out", **how)
    again = gossamer.recover(pruned, tmp_path / "out", **how)
    assert again.training == whole.training
    ours, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    if not chooses:
        assert all(torch.equal(zeros(pruned)[name], mask) for name, mask in zeros(tmp_path / "out").items())
    assert again.totals["sparsity"] == 0.5


def test_another_recipe_is_refused_and_told_apart(pruned: Path, text: Path, tmp_path: Path, kill: Any) -> None:
    kill(1, pruned, tmp_path / "out", data=text, **SMALL)
    with pytest.raises(
        GossamerError, match=r"stopped at step 1 with another recipe: steps was 6 and is 7, rate was 0.001 and is"
    ):
        gossamer.recover(pruned, tmp_path / "out", data=text, **SMALL | {"steps": 7, "rate": 1e-4})
    text.write_text(text.read_text()[40:])
    with pytest.raises(GossamerError, match="with another recipe: the text changed; give"):
        gossamer.recover(pruned, tmp_path / "out", data=text, **SMALL)
    report = gossamer.recover(pruned, tmp_path / "out", data=text, force=True, **SMALL | {"steps": 7})
    assert report.training is not None
    assert len(report.training["losses"]) == 7


def test_a_loss_that_is_nan_stops_with_the_model_before_it(pruned: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Spoilt(gossamer.sites.distilling.Distill):
        calls = 0

        def __call__(self, *args: Any) -> torch.Tensor:
            Spoilt.calls += 1
            return super().__call__(*args) * (float("nan") if Spoilt.calls == 4 else 1.0)

    monkeypatch.setattr(gossamer.sites.distilling, "Distill", Spoilt)
    with pytest.raises(GossamerError, match=r"the loss is not finite at step 4 .*the model after step 3 is in .*out-step-3"):
        gossamer.recover(pruned, tmp_path / "out", data=text, every=0, **SMALL)
    Spoilt.calls = 0
    with pytest.raises(GossamerError, match=r"the model after step 3 is in .*out-step-3-1"):  # what is there is left alone
        gossamer.recover(pruned, tmp_path / "out", data=text, every=0, **SMALL)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.training").exists()
    kept, start = zeros(tmp_path / "out-step-3"), tensors(pruned)
    assert all(torch.equal(kept[name], zeros(pruned)[name]) for name in kept)
    assert any(not torch.equal(start[name], tensor) for name, tensor in tensors(tmp_path / "out-step-3").items())
    gossamer.recover(tmp_path / "out-step-3", tmp_path / "out", data=text, loss="task", **SMALL)


def test_a_first_step_that_breaks_writes_nothing(pruned: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_loop.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(GossamerError, match=r"a gradient is not finite at step 1 .*nothing is written"):
        gossamer.recover(pruned, tmp_path / "out", data=text, **SMALL)
    assert not list(tmp_path.glob("*out*"))


def test_casting_back_counts_what_becomes_zero(tiny_llama: Any, tiny_tokenizer: Any, text: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    gossamer.prune(model, "Magnitude", "2:4")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[weight != 0] = 1e-7  # kept, and near the least that float16 holds
        weight[0, weight[0] != 0] = 4e-8  # it rounds to the least number there is, and training makes it less
    gossamer.save(model.half(), tmp_path / "half", tokenizer=tiny_tokenizer)
    kept = int((tensors(tmp_path / "half")["model.layers.0.mlp.up_proj.weight"] != 0).sum())
    report = gossamer.recover(tmp_path / "half", tmp_path / "out", data=text, loss="task", **SMALL | {"rate": 6e-8, "steps": 4})
    now = int((tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"] != 0).sum())
    assert report.training is not None
    assert report.model["dtype"] == "float16"
    assert report.training["rounded"] == kept - now > 0


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"method": "Ful"}, "unknown method 'Ful'; did you mean Full"),
        ({"method": "Full(rank=2)"}, "cannot make the method"),
        ({"pattern": "2:4"}, "keeps the zeros that are there"),
        ({"steps": 0}, "steps is at least 1"),
        ({"batch": 0}, "batch is more than 0, not 0"),
        ({"rate": -1.0}, "rate is more than 0"),
        ({"loss": "square"}, "unknown loss 'square'"),
        ({"method": "Reconstruct", "rate": 1e-3}, "a rate and a loss of its own"),
        ({"method": "Reconstruct", "rate": None, "pattern": "2:4"}, "keeps the zeros that are there"),
        ({"method": "AST"}, "chooses the mask: say by which pattern"),
        ({"method": "AST", "pattern": "2:5"}, "2:5"),
        ({"loss": "distill(task=-1.0)"}, "the weights of a loss are not negative"),
        ({"seqlen": 4096}, "one window of seqlen 4096"),
        ({"seqlen": 160}, "lower seqlen"),
        ({"data": "nothing.txt"}, "no data 'nothing.txt'"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"targets": "*.nope"}, "no weight matches"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_mistake_changes_nothing(pruned: Path, text: Path, tmp_path: Path, how: dict[str, Any], told: str) -> None:
    with pytest.raises(GossamerError, match=told) as raised:
        gossamer.recover(pruned, tmp_path / "out", **SMALL | {"data": text} | how)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*out*"))


def test_all_of_a_shrunk_model_is_trained_again_and_again(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    shrink_checkpoint(tiny_dir, a, "AdaptPruner(step=0.1)", sparsity=0.2, data=text, seqlen=16, name=str(tiny_dir))
    report = gossamer.recover(a, b, data=text, evaluate=text, eval_seqlen=16, **SMALL | {"steps": 20})
    assert report.training is not None
    assert report.evaluation is not None
    assert report.evaluation["perplexity"] < report.training["before"]
    assert report.recipe["teacher"] == str(tiny_dir)
    before, after = tensors(a), tensors(b)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert not any(torch.equal(before[name], t) for name, t in after.items())
    gossamer.recover(b, c, data=text, **SMALL)  # its report says that it comes from a shrunk one
    with pytest.raises(GossamerError, match="MaskLoRA is to keep zeros"):
        gossamer.recover(a, tmp_path / "out", "MaskLoRA", data=text, **SMALL)


def test_a_killed_run_on_a_shrunk_model_ends_with_the_same_bits(
    tiny_dir: Path, text: Path, tmp_path: Path, kill: Callable[..., None]
) -> None:
    shrink_checkpoint(tiny_dir, tmp_path / "a", "Depth", sparsity=0.5, data=text, seqlen=16, name=str(tiny_dir))
    with pytest.raises(GossamerError, match="student and teacher differ in num_hidden_layers"):
        gossamer.recover(tmp_path / "a", tmp_path / "whole", data=text, **SMALL)
    gossamer.recover(tmp_path / "a", tmp_path / "whole", data=text, loss="task", **SMALL)
    kill(3, tmp_path / "a", tmp_path / "out", data=text, loss="task", **SMALL)
    gossamer.recover(tmp_path / "a", tmp_path / "out", data=text, loss="task", **SMALL)
    whole, again = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.items())


def test_a_dense_model_a_packed_one_and_one_of_unknown_origin_are_refused(
    tiny_dir: Path, pruned: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(GossamerError, match=r"only 0.00% of the weights are zero, and Full is to keep zeros: prune .* LoRA"):
        gossamer.recover(tiny_dir, tmp_path / "out", data=text, loss="task", **SMALL)
    with pytest.raises(GossamerError, match=r"only 0.00% of the weights are zero"):  # before it is asked for a teacher
        gossamer.recover(tiny_dir, tmp_path / "out", data=text, **SMALL)
    gossamer.save(gossamer.load(pruned), tmp_path / "packed", packed=True)
    with pytest.raises(GossamerError, match="gossamer unpack"):
        gossamer.recover(tmp_path / "packed", tmp_path / "out", data=text, **SMALL)
    (pruned / "report.json").unlink()
    with pytest.raises(GossamerError, match="has no report that names it: give the teacher"):
        gossamer.recover(pruned, tmp_path / "out", data=text, **SMALL)
    assert not list(tmp_path.glob("*out*"))


def test_every_window_is_seen_before_one_comes_again() -> None:
    plan, windows = Plan(steps=7, batch=4, micro=2, rate=1.0, max_norm=1.0, seed=3), torch.arange(10)[:, None]
    drawn = torch.cat(list(plan.batches(windows, 0))).flatten()
    assert drawn[:10].sort().values.tolist() == drawn[10:20].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:20].tolist()
    assert torch.equal(torch.cat(list(plan.batches(windows, 5))).flatten(), drawn[20:])


def test_micro_batches_learn_what_the_whole_one_does(pruned: Path, text: Path, tmp_path: Path) -> None:
    one = gossamer.recover(pruned, tmp_path / "one", data=text, **SMALL)
    two = gossamer.recover(pruned, tmp_path / "two", data=text, micro=1, **SMALL)
    assert one.training is not None
    assert two.training is not None
    # SquareHead is a ratio of sums over the pass, so parts of a batch weigh a little differently than the whole.
    assert two.training["losses"] == pytest.approx(one.training["losses"], rel=0.05)


def test_the_report_is_json_that_has_every_loss(pruned: Path, text: Path, tmp_path: Path) -> None:
    gossamer.recover(pruned, tmp_path / "out", data=text, loss="task", **SMALL)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(found["training"]["losses"]) == SMALL["steps"]
    assert found["recipe"]["teacher"] is None


def test_what_was_trained_before_is_known_when_it_is_trained_again(pruned: Path, text: Path, tmp_path: Path) -> None:
    first = gossamer.recover(pruned, tmp_path / "once", data=text, **SMALL)
    again = gossamer.recover(tmp_path / "once", tmp_path / "twice", "MaskLoRA(rank=2)", data=text, **SMALL)
    assert again.recipe["pruned_by"] == "Magnitude → Full"
    assert again.recipe["teacher"] == first.recipe["teacher"]


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_to_nothing() -> None:
    plan = Plan(steps=20, batch=1, micro=1, rate=1.0, max_norm=1.0, seed=0)
    assert [plan.factor(step) for step in (0, 1, 2, 10, 19)] == pytest.approx([0.5, 0.95, 0.9, 0.5, 0.05])
