"""The page says what its documents say, in the same bytes each time, and its charts are really drawn."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.html import page

BLOCKS = 3
SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 16)}
MODEL = {"name": "tiny", "class": "TinyForCausalLM", "parameters": 1000, "dtype": "float32", "itemsize": 4, "bytes": 4000}
TEXT = {"tokens": 4096, "seqlen": 128, "windows": 32, "data": "words"}


def prune(method: str, pattern: str = "2:4", sparsity: float | None = None, perplexity: float | None = 20.0) -> dict[str, Any]:
    weights = []
    for block in range(BLOCKS):
        for kind, shape in SHAPES.items():
            size = math.prod(shape)
            nnz = round((1 - (sparsity or 0.5)) * size)
            name = f"model.layers.{block}.{kind}.weight"
            weights.append({"name": name, "shape": list(shape), "sparsity": 1 - nnz / size, "nnz": nnz, "block": block})
    recipe = {
        "method": method,
        "pattern": pattern,
        "sparsity": sparsity,
        "seed": 0,
        "command": f"gossamer prune tiny --method {method}",
    }
    report = Report(
        kind="prune",
        recipe=recipe,
        model=MODEL,
        weights=weights,
        seconds={"total": 4.5, "calibrate": 1.25, "prune": 3.25},
        peak_bytes={"resident": 123_000_000},
        environment={"python": "3.11"},
        evaluation=None if perplexity is None else {"perplexity": perplexity, **TEXT},
    )
    return report.to_json()


def compare(*runs: dict[str, Any]) -> dict[str, Any]:
    dense = {"perplexity": 11.125, "tokens": 4096, "seqlen": 128, "windows": 32, "seconds": 0.75, "bytes": 4000}
    head = {
        "format": 1,
        "kind": "compare",
        "command": "gossamer compare tiny",
        "model": MODEL,
        "environment": {"python": "3.11"},
    }
    return {**head, "data": {"calibration": "words", "evaluation": "words"}, "dense": dense, "runs": list(runs)}


class Cells(HTMLParser):
    """The text of each row's cells of the table of results."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(re.search(r'<table class="results".*?</table>', text, re.S)[0])  # type: ignore[index]

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += re.sub(r"\s+", " ", data)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in Cells(text).rows[1:]]


def test_the_same_documents_give_the_same_bytes_and_stay_as_they_were():
    documents = [compare(prune("Magnitude"), prune("Wanda", perplexity=15.0)), prune("Wanda", "Unstructured", 0.5)]
    before = json.dumps(documents)
    assert page(documents) == page(json.loads(before))
    assert json.dumps(documents) == before


def test_the_table_has_the_numbers_of_the_document():
    size = BLOCKS * sum(math.prod(shape) for shape in SHAPES.values())
    counted = 4000 - 4 * size + 4 * (size // 2) + math.ceil(size / 8)
    text = page([compare(prune("Magnitude", perplexity=44.5), prune("Wanda", perplexity=15.0))])
    assert rows(text) == [
        ["Dense", "–", "0 %", "11.12", "1.00", "4 kB", "0.75 s", "–"],
        ["Magnitude", "2:4", "50 %", "44.50", "4.00", f"4 kB → {counted / 1000:.3g} kB", "4.50 s", "123 MB"],
        ["Wanda", "2:4", "50 %", "lowest15.00", "1.35", f"4 kB → {counted / 1000:.3g} kB", "4.50 s", "123 MB"],
    ]
    for value in (11.125, 44.5, 44.5 / 11.125, counted, 123_000_000):
        assert f'<data value="{value}">' in text
    assert "Lowest perplexity (dense: 11.12): Wanda with 15.00 (1.35× dense) at 2:4 50 %." in text


def test_bad_rows_stay():
    text = page([compare(prune("Wanda", perplexity=1e9), prune("RIA", perplexity=math.nan), prune("Random", perplexity=None))])
    assert [(row[0], row[3]) for row in rows(text)[1:]] == [
        ("Wanda", "1,000,000,000"),
        ("RIA", "not finite"),
        ("Random", "not evaluated"),
    ]
    assert "Not drawn, as the perplexity is not finite: RIA at 2:4 · 50 %." in text


def test_everything_is_escaped():
    evil = "<script>alert(1)</script>"
    document = prune(evil)
    document["recipe"] |= {"pattern": f"2:4{evil}", "command": f"gossamer {evil}", evil: evil}
    document["model"] = {**MODEL, "name": evil, "class": evil, "dtype": evil}
    document["environment"] = {evil: evil}
    document["evaluation"]["data"] = evil
    document["seconds"][evil] = 1.0
    document["weights"][0] |= {"name": f"model.layers.0.{evil}", "note": evil}
    text = page([document], title=evil)
    assert evil not in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "its kind is None"),
        ({"kind": "bench", "format": 1}, "its kind is 'bench'"),
        ({"kind": "prune", "format": 2}, "not a gossamer report of format 1"),
        ({"kind": "prune", "format": 1, "recipe": {}}, "not a gossamer report of kind 'prune'"),
        ({**prune("Wanda"), "weights": [{"name": "a", "shape": [2]}]}, "it has no 'nnz'"),
        ({**prune("Wanda"), "surprise": 1}, "surprise"),
        ({"kind": "compare", "runs": []}, "it has no 'model'"),
        ({**compare(), "runs": [3]}, "not a gossamer report of kind 'compare'"),
    ],
)
def test_an_unknown_document_is_one_clear_line(document, message):
    with pytest.raises(GossamerError, match=f"^document 2 .*{re.escape(message)}[^\n]*$"):
        page([prune("Wanda"), document])


def test_no_document_is_a_mistake():
    with pytest.raises(GossamerError, match="at least one"):
        page([])


def test_what_is_missing_is_said():
    document = prune("Wanda", perplexity=None)
    for weight in document["weights"]:
        weight["block"] = None
    text = page([{**document, "seconds": {}, "peak_bytes": {}}])
    assert text.count("Left out:") == 3  # quality, time, layers
    assert "Nothing here was evaluated" in text


def test_documents_are_merged_by_model_and_by_text():
    again = prune("Wanda", perplexity=21.0)
    again["recipe"]["seed"] = 1
    elsewhere = {**prune("Wanda"), "model": {**MODEL, "name": "other"}}
    longer = copy.deepcopy(prune("Wanda"))
    longer["evaluation"]["seqlen"] = 256
    text = page([prune("RIA", perplexity=None), compare(prune("Wanda")), prune("Wanda"), again, elsewhere, longer])
    assert text.count('<section class="study">') == 3
    assert [row[0] for row in rows(text)] == ["Dense", "Wanda (seed 0)", "Wanda (seed 1)", "RIA"]


def test_it_is_one_file_with_one_plotly():
    text = page([prune("Wanda")])
    assert text.count("plotly.js v") == 1
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text)


def drawn(text: str, folder: Path) -> list[tuple[str, str]]:
    """The name of each chart of the page, and what a browser made of it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    (folder / "page.html").write_text(text, encoding="utf-8")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # chromium refuses root within one
    command = [browser, "--headless", "--disable-gpu", *sandbox, *quiet, f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return re.findall(r'<figure [^>]*data-chart="(\w+)">(.*?)</figure>', done.stdout.decode("utf-8"), re.DOTALL)


def count(pattern: str, dom: str) -> int:
    return len(re.findall(pattern, dom))


def test_a_browser_draws_every_chart(tmp_path):
    settings = (("2:4", None), ("Unstructured", 0.6))
    bars = compare(*(prune(method, *setting) for method in ("Magnitude", "<b>Wanda") for setting in settings))
    sweep = [prune(m, "Unstructured", s, 12 + 900 * s**4) for m in ("Magnitude", "Wanda") for s in (0.25, 0.5, 0.75)]
    lines = {**compare(*sweep), "model": {**MODEL, "name": "swept"}}
    charts = drawn(page([bars, lines]), tmp_path)
    assert [name for name, _ in charts] == ["quality", "size", "time", "layers"] * 2
    assert all('class="main-svg"' in dom for _, dom in charts)

    quality, size, time, layers = (dom for _, dom in charts[:4])
    assert count('<g class="trace bars', quality) == 2  # methods
    assert count('<g class="point"', quality) == 4  # runs
    assert count('<g class="trace bars', size) == 3  # not pruned, values, bits
    assert count('<g class="point"', size) == 3 * 3  # dense and two settings
    assert count('<g class="trace bars', time) == 2  # calibrate, prune
    assert count('<g class="hm"', layers) == 2  # settings: the methods agree within each
    assert "&lt;b&gt;Wanda" in time

    quality = charts[4][1]
    assert count('<g class="trace scatter', quality) == 2  # methods
    assert count('<path class="point"', quality) == 6  # runs
    assert "log scale" in quality


def test_measured_speed_is_drawn_with_the_rows_that_lose() -> None:
    fast, slow = prune("Wanda", perplexity=20.0), prune("SparseGPT", perplexity=15.0)
    fast["speed"] = {"batch": 1, "context": 128, "dense": 0.05, "packed": 0.025, "ratio": 2.0}
    slow["speed"] = {"batch": 1, "context": 128, "dense": 0.05, "packed": 0.1, "ratio": 0.5}
    drawn = page([compare(fast, slow)])
    assert 'data-chart="trade"' in drawn
    assert "15.00 at 10 tokens/s" in drawn
    assert "20.00 at 40 tokens/s" in drawn
    assert "Dense 11.12, 20 tokens/s" in drawn
    assert drawn.count('scope="col">Tokens/s') == 1
    assert 'data-chart="trade"' not in page([compare(prune("Wanda"))])


def test_training_is_drawn_beside_what_it_began_with(tmp_path: Path) -> None:
    recovered = prune("MaskLoRA(rank=8)", perplexity=14.5)
    recovered |= {"kind": "recover", "training": {"losses": [3.0, None, 2.0], "before": 20.5, "dense": 11.125, "rounded": 0}}
    recovered["recipe"] |= {"pruned_by": "Wanda", "source": "tiny", "steps": 3}
    text = page([recovered])
    names = [(row[0], row[3]) for row in rows(text)]
    assert names == [("Dense", "11.12"), ("Wanda", "20.50"), ("Wanda → MaskLoRA(rank=8)", "lowest14.50")]
    assert "Loss: Wanda → MaskLoRA(rank=8), first 3.00; Wanda → MaskLoRA(rank=8), last 2.00." in text
    assert 'data-chart="loss"' not in page([prune("Wanda")])
    loss = dict(drawn(text, tmp_path))["loss"]
    assert count('<g class="trace scatter', loss) == 1


def test_training_that_was_not_evaluated_is_drawn() -> None:
    recovered = prune("Full", perplexity=None)
    recovered |= {"kind": "recover", "training": {"losses": [3.0, 2.0], "rounded": 0}}
    recovered["recipe"] |= {"pruned_by": None, "pattern": None}
    assert [(row[0], row[1]) for row in rows(page([recovered]))] == [("Full", "as it came")]
