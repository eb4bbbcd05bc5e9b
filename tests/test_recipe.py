"""Recipes: one file from a dense model to a packed one; it goes on after a kill, and is refused where it cannot be run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer import recipe
from gossamer.core.errors import GossamerError
from gossamer.recipe import Recipe
from gossamer.recovering._state import State


class Killed(BaseException):
    pass


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. The spider spins a thin thread; gossamer is light and strong.\n" for i in range(60)))
    return path


@pytest.fixture
def steps(text: Path) -> list[dict[str, Any]]:
    windows = {"data": str(text), "seqlen": 16}
    return [
        {"prune": {"method": "Wanda", "pattern": "2:4", "samples": 4, **windows}},
        {"evaluate": {"windows": 8, **windows}},
        {"recover": {"method": "Full", "steps": 5, "batch": 2, "rate": 1e-3, **windows}},
        {"evaluate": {"windows": 8, **windows}},
        {"pack": {"context": 16}},
    ]


def run(tiny: Path, steps: list[dict[str, Any]], folder: Path, **how: Any) -> dict[str, Any]:
    return recipe.run(Recipe.from_json({"model": str(tiny), "steps": steps}), folder, **how)


def test_it_leads_from_dense_to_packed(tiny_dir: Path, steps: list[dict[str, Any]], tmp_path: Path) -> None:
    found = run(tiny_dir, steps, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1-prune", "3-recover", "5-pack", "lock", "recipe.json"]
    pruned, recovered = found["runs"]
    assert pruned["kind"] == "prune"
    assert recovered["kind"] == "recover"
    assert recovered["evaluation"]["perplexity"] < pruned["evaluation"]["perplexity"]
    assert found["dense"]["perplexity"] > 1
    assert recovered["speed"]["dense"] > 0
    packed, loaded = gossamer.load(tmp_path / "out" / "5-pack"), gossamer.load(tmp_path / "out" / "3-recover")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(packed(ids).logits, loaded(ids).logits)
    from gossamer.html import page

    assert "Wanda → Full" in page([found])


def test_a_killed_recipe_goes_on_to_the_same_bits(
    tiny_dir: Path, steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    steps = steps[:4]
    whole = run(tiny_dir, steps, tmp_path / "whole")
    save, said = State.save, list[str]()

    def dies(self: Any, *args: Any) -> None:
        save(self, *args)
        raise Killed

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished step is not done again")

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", dies)
        patch.setattr(recipe, "recover", lambda *a, **k: gossamer.recover(*a, **k, every=0))
        with pytest.raises(Killed):
            run(tiny_dir, steps, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "prune_checkpoint", never)
        again = run(tiny_dir, steps, tmp_path / "out", say=said.append)
    assert said[0] == "1 prune: kept from the run before"
    assert again["runs"][1]["training"]["losses"] == whole["runs"][1]["training"]["losses"]
    assert again["runs"][1]["evaluation"]["perplexity"] == whole["runs"][1]["evaluation"]["perplexity"]


def test_another_recipe_is_refused_and_told_apart(tiny_dir: Path, steps: list[dict[str, Any]], tmp_path: Path) -> None:
    run(tiny_dir, steps[:2], tmp_path / "out")
    other = [{"prune": {**steps[0]["prune"], "samples": 5}}, steps[1]]
    with pytest.raises(GossamerError, match="step 1 is done and was another: samples was 4 and is 5; --force starts over"):
        run(tiny_dir, other, tmp_path / "out")
    with pytest.raises(GossamerError, match="2 steps are done, and the recipe has 1"):
        run(tiny_dir, steps[:1], tmp_path / "out")
    found = run(tiny_dir, steps[:3], tmp_path / "out")  # more steps: it goes on
    assert len(found["runs"]) == 2
    run(tiny_dir, other, tmp_path / "out", force=True)


PRUNE = {"prune": {"method": "Magnitude", "pattern": "2:4"}}


def test_the_text_of_an_evaluation_is_looked_for_in_its_own_split(tiny_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("gossamer.recipe.texts", lambda data, *, split: asked.append((data, split)))

    def begun(*_: Any) -> None:
        raise GossamerError("begun")

    monkeypatch.setattr("gossamer.recipe._Bench.do", begun)
    with pytest.raises(GossamerError, match="begun"):
        run(tiny_dir, [PRUNE, {"recover": {"data": "a", "steps": 3, "evaluate": "b"}}], tmp_path / "out")
    assert asked == [("a", "calibration"), ("b", "evaluation")]


@pytest.mark.parametrize(
    ("late", "told"),
    [
        ({"recover": {"data": "nowhere.txt", "steps": 3}}, "step 2 of the recipe: no data 'nowhere.txt'"),
        ({"evaluate": {"data": "nowhere.txt"}}, "step 2 of the recipe: no data 'nowhere.txt'"),
        ({"evaluate": {"windows": 10**6, "seqlen": 16}}, "step 2 of the recipe: .* fewer than the 1000000 asked for"),
        ({"evaluate": {"seqlen": 4096}}, "step 2 of the recipe: windows of 4096 tokens are longer than"),
    ],
)
def test_a_text_that_is_not_there_shows_before_the_first_step(late: Any, told: str, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match=told):
        run(tiny_dir, [PRUNE, late], tmp_path / "out")
    assert not (tmp_path / "out" / "1-prune").exists()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "a recipe is an object"),
        ({"model": "x", "steps": []}, "no steps"),
        ({"model": "x", "steps": [{"prune": 3}]}, "step 1 of the recipe is no object"),
        ({"model": "x", "steps": [{"prun": {}}]}, "unknown verb 'prun'; known: prune"),
        ({"model": "x", "steps": [{"prune": {"method": "Wanda"}}]}, "prune wants pattern"),
        ({"model": "x", "steps": [{"prune": {"method": "Wanda", "pattern": "2:4", "out": "y"}}]}, "prune takes no 'out'"),
        ({"model": "x", "steps": [{"prune": {"method": "Wand", "pattern": "2:4"}}]}, "step 1 .*did you mean Wanda"),
        ({"model": "x", "steps": [{"recover": {"data": "d", "steps": 0}}]}, "step 1 .*at least 1"),
        ({"model": "x", "steps": [{"pack": {}}]}, "begins with pack"),
        ({"model": "x", "steps": [PRUNE, {"pack": {"batch": "x"}}]}, "step 2 .*pack wants batch to be an integer.* got 'x'"),
        (
            {"model": "x", "steps": [PRUNE, {"evaluate": {"data": 5}}]},
            "evaluate wants data to be the name of a text; got 5",
        ),
        ({"model": "x", "steps": [PRUNE, {"evaluate": {"windows": 0}}]}, "step 2 .*evaluate wants windows .*at least 1; got 0"),
    ],
)
def test_a_mistake_shows_before_anything_is_done(value: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(value))
    with pytest.raises(GossamerError, match=told):
        Recipe.load(tmp_path / "recipe.json")


def test_a_model_is_shrunk_then_pruned(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    windows = {"data": str(text), "seqlen": 16}
    steps: list[dict[str, Any]] = [
        {"shrink": {"method": "CFSP(a=5000.0)", "sparsity": 0.3, "samples": 4, **windows}},
        {"prune": {"method": "Wanda", "pattern": "2:4", "samples": 4, **windows}},
        {"evaluate": {"windows": 8, **windows}},
    ]
    found = run(tiny_dir, steps, tmp_path / "out")
    assert [row["kind"] for row in found["runs"]] == ["shrink", "prune"]
    shrunk, pruned = gossamer.load(tmp_path / "out" / "1-shrink"), gossamer.load(tmp_path / "out" / "2-prune")
    assert [p.shape for p in shrunk.parameters()] == [p.shape for p in pruned.parameters()]
    assert found["runs"][0]["totals"]["sparsity"] == pytest.approx(0.3, abs=0.05)
    from gossamer.html import page

    assert "CFSP" in page([found])
    with pytest.raises(GossamerError, match="step 1 of the recipe: sparsity is the fraction"):
        run(tiny_dir, [{"shrink": {"method": "Depth", "sparsity": 2.0}}], tmp_path / "other")
