"""The documentation is up to date: its tables, its links, its commands, and the README's example."""

import json
import math
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import gossamer
from gossamer import cli, models, recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


# A recipe's numbers for a tiny model on a slow machine; its verbs, methods, goals and text stay the page's own.
SMALL: dict[str, dict[str, Any]] = {
    "prune": {"samples": 4, "seqlen": 32},
    "shrink": {"samples": 4, "seqlen": 32},
    "recover": {"steps": 3, "batch": 2, "seqlen": 32},
    "evaluate": {"windows": 2, "seqlen": 32},
    "pack": {"context": 16},
}


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCED.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page: Path) -> set[str]:
    """Return what a link to a heading of the page may say after #."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def generate() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))


def test_every_kind_of_name_has_its_table(generate: dict[str, Any]) -> None:
    marked = {kind for page in PAGES for _, kind, _ in generate["PART"].findall(page.read_text(encoding="utf-8"))}
    assert marked == {*generate["OTHERS"], *generate["catalogue"]()}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_tables_are_up_to_date(page: Path, generate: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate["render"](text) == text, "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{label(page)} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{label(page)} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    shown = [line for body in code(page, "sh") for line in body.splitlines() if line.startswith("gossamer ")]
    for line in shown:
        words = shlex.split(line, comments=True)
        options = commands[words[1]].params
        known = {option for parameter in options for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words[2:] if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_python_is_python(page: Path) -> None:
    for body in code(page, "python"):
        compile(body, label(page), "exec")


def test_the_readme_example_runs(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_dir / "config.json").read_text())
    (tiny_dir / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))  # the default seqlen
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "resolve", lambda name: tiny_dir)  # SmolLM2's part is played by a tiny Llama
    (body,) = code(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(body, "README.md", "exec"), names)
    weight = names["again"].model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert "SparseGPT 2:4: 14 weights" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "sparsity.json").is_file()


RECIPES = {
    f"{label(page)}-{place}": value
    for page in PAGES
    for place, body in enumerate(code(page, "json"))
    if "steps" in (value := json.loads(body))
}


@pytest.mark.parametrize("shown", RECIPES.values(), ids=RECIPES)
def test_the_recipes_run(shown: dict[str, Any], tiny_llama: Any, tiny_dir: Path, tmp_path: Path) -> None:
    recipe.Recipe.from_json(shown)  # as it is shown
    with models.quiet():
        tiny_llama(intermediate_size=128).save_pretrained(tiny_dir)  # wide enough for 5 % to be some channels
    steps = [{verb: how | SMALL[verb]} for step in shown["steps"] for verb, how in step.items()]
    out, said = tmp_path / "out", list[str]()
    found = recipe.run(recipe.Recipe.from_json({"model": str(tiny_dir), "steps": steps}), out, say=said.append)

    order = [f"{place} {verb}" for place, step in enumerate(steps, 1) for verb in step]
    assert [line for line in said if line in order] == order
    assert len(json.loads((out / "recipe.json").read_text())["made"]) == len(order)
    made = [name.split() for name in order if not name.endswith(("evaluate", "pack"))]
    assert [run["kind"] for run in found["runs"]] == [verb for _, verb in made]
    before = gossamer.load(tiny_dir)
    for (place, verb), run in zip(made, found["runs"], strict=True):
        after = gossamer.load(out / f"{place}-{verb}")
        inside = [sum(w.numel() for w in model.model.layers.parameters()) for model in (before, after)]
        # Only training touches the embeddings: that it did, and that each step goes on from the one before, shows there.
        same = torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
        assert same == (verb != "recover")
        if verb == "shrink":
            assert run["structure"]["inside"] == inside
            assert 1 - inside[1] / inside[0] == pytest.approx(run["recipe"]["sparsity"], abs=0.02)
            assert inside[1] < inside[0]
        else:
            assert inside[0] == inside[1]
        if verb == "recover":
            assert len(run["training"]["losses"]) == SMALL["recover"]["steps"]
            assert all(map(math.isfinite, run["training"]["losses"]))
        before = after
    scored = [run["evaluation"]["perplexity"] for run in found["runs"] if run.get("evaluation")]
    assert scored
    assert all(map(math.isfinite, scored))


def test_what_was_measured_is_ranked_in_a_table_for_each_pattern(
    generate: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "allocate": "uniform",
        "sparsity": 0.5,
        "spread": None,
        "seeds": 1,
        "seconds": 30.0,
        "peak_bytes": 2e9,
        "speed": None,
    }
    rows = [
        row | {"method": "A", "pattern": "2:4", "asked": None, "perplexity": None, "tasks": {}},
        row
        | {
            "method": "B",
            "pattern": "2:4",
            "asked": None,
            "perplexity": 40.0,
            "tasks": {"arc": 0.5},
            "spread": 1.5,
            "seeds": 3,
        },
        row | {"method": "C", "pattern": "NM(2, 4, permute=True)", "asked": None, "perplexity": 30.0, "tasks": {"arc": 0.25}},
        row
        | {
            "method": "D",
            "pattern": "Unstructured(per='row')",
            "asked": 0.7,
            "perplexity": 50.0,
            "tasks": {},
            "allocate": "owl",
        },
    ]
    how = {"samples": 8, "windows": 4}
    found = {
        "dense": {"perplexity": 20.0, "tasks": {"arc": {"acc": 0.6}}},
        "parts": {"x": {**how, "rows": [{"pass": 10.0, "machine": "2 CPU cores", "dense": 20.0} | row for row in rows]}},
    }
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "methods.json").write_text(json.dumps(found))
    monkeypatch.setitem(generate["measured"].__globals__, "ROOT", tmp_path)
    lines = generate["measured"]().splitlines()
    assert lines[0] == "Dense: 20.00, arc 60.0%; calibrated on 8 windows, perplexity over 4, on 2 CPU cores."
    assert [line for line in lines if line.startswith("#")] == ["### 2:4", "### Unstructured, 70 %"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [row[0] for row in cells] == ["`C`", "`B`", "`A`", "`D`"]
    assert cells[0] == ["`C`", "permuted", "30.00", "1.50", "–", "25.0%", "30", "3.0", "2.00 GB"]
    assert cells[1] == ["`B`", "–", "40.00", "2.00", "1.50 (3)", "50.0%", "30", "3.0", "2.00 GB"]
    assert cells[2][2] == "not finite"
    assert cells[3][:4] == ["`D`", "owl", "50.00", "2.50"]


def test_what_was_shrunk_has_a_table_for_each_goal(
    generate: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"samples": 8, "seqlen": 32, "windows": 4, "dense": 20.0, "machine": "GPU", "parameters": [2000, 1000], "seeds": 1}
    row = made | {"goal": "0.125", "sparsity": 0.12345, "tasks": {}, "at": None}
    row |= dict.fromkeys(("spread", "seconds", "ratio", "peak_bytes"))
    rows = [
        row | {"method": "A", "perplexity": None},
        row | {"method": "B", "perplexity": 40.0, "tasks": {"arc": 0.5}, "spread": 1.5, "seeds": 3},
        row | {"method": "C", "perplexity": 30.0, "seconds": 5.0, "ratio": 1.2, "at": "1x512", "machine": "2 CPU cores"},
        row | {"method": "D", "perplexity": 50.0, "goal": "1.3x"},
    ]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "shrunk.json").write_text(json.dumps({"dense": {"tasks": {"arc": 0.6}}, "rows": rows}))
    monkeypatch.setitem(generate["shrunk"].__globals__, "ROOT", tmp_path)
    lines = generate["shrunk"]().splitlines()
    how = "calibrated on 8 windows of 32 tokens, perplexity over 4, where the dense model has 20.00, on GPU:"
    assert lines[0] == "Dense: 2,000 parameters, arc 60.0%."
    assert [line for line in lines if line.endswith(":")] == [f"12.5 % removed, {how}", f"1.3x as fast, {how}"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|") and "--" not in line]
    most = ["method", "parameters left", "of the blocks removed", "perplexity", "× dense", "spread", "arc"]
    assert cells == [
        [*most, "seconds to shrink", "a pass of 1x512, as fast", "on"],
        ["`C`", "1,000", "0.1235", "30.00", "1.50", "–", "–", "5", "1.20x", "2 CPU cores"],
        ["`B`", "1,000", "0.1235", "40.00", "2.00", "1.50 (3)", "50.0%", "–", "–", "–"],
        ["`A`", "1,000", "0.1235", "not finite", "–", "–", "–", "–", "–", "–"],
        most[:5],
        ["`D`", "1,000", "0.1235", "50.00", "2.50"],
    ]


def test_every_structure_has_its_paper_s_claim(generate: dict[str, Any]) -> None:
    named = {line.split("`")[1] for line in generate["claims"]("structures").splitlines() if "`" in line}
    assert named == {thing["name"] for thing in generate["catalogue"]()["structures"]}
