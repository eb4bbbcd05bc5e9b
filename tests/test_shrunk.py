"""benchmarks/shrunk.py: a row for each method, in the place of the one made alike, from several processes at once too."""

import json
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gossamer.models import quiet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports from the benchmark beside it
    found = runpy.run_path(str(BENCHMARKS / "shrunk.py"))
    monkeypatch.setitem(found["main"].__globals__, "ROUNDS", 1)
    return found


def row(method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "goal": "0.2", "samples": 8, "seqlen": 16, "windows": 4, "perplexity": 30.0, "tasks": {}} | more


def test_it_keeps_a_row_for_each_method(
    shrunk: dict[str, Any], tiny_dir: Path, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():
        tiny_llama(max_position_embeddings=512).save_pretrained(tiny_dir)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}. The spider spins a thin thread; gossamer is light and strong.\n" for i in range(60)))
    asked = list[Any]()

    def tasks(model: Any, names: str, *_: Any, **how: Any) -> dict[str, dict[str, float]]:
        asked.append(len(model.model.layers))
        return {names: {"acc": 0.25, "acc_stderr": 0.1}}

    monkeypatch.setitem(shrunk["main"].__globals__, "tasks", tasks)
    how = ["--model", tiny_dir, "--calibration", text, "--evaluation", text, "--json", tmp_path / "rows.json"]
    more = ["--windows", 2, "--samples", 2, "--seqlen", 16, "--at", "1x16", "--seeds", 2, "--tasks", "arc"]
    methods = ["--methods", "Depth(consecutive=True)@0.5;WeLore@0.1"]
    monkeypatch.setattr(sys, "argv", ["shrunk.py", *map(str, [*how, *more, *methods])])
    shrunk["main"]()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert asked == [2, 1, 2], "the dense model, and the first draw of each"
    assert found["dense"] == {"tasks": {"arc": 0.25}}
    depth, welore = found["rows"]
    assert [depth["method"], depth["goal"], depth["seeds"]] == ["Depth", "0.5", 2]
    assert [depth[key] for key in ("samples", "seqlen", "windows", "at")] == [2, 16, 2, "1x16"]
    assert depth["sparsity"] == 0.5
    assert depth["parameters"][1] < depth["parameters"][0]
    assert depth["spread"] >= 0
    assert depth["dense"] == welore["dense"] > 1
    assert all(depth[key] > 0 for key in ("perplexity", "seconds", "ratio", "peak_bytes"))
    assert depth["machine"].endswith(("CPU core", "CPU cores"))
    assert [welore["method"], welore["seeds"], welore["spread"]] == ["WeLore", 1, None], "it reads no data"
    assert depth["tasks"] == welore["tasks"] == {"arc": 0.25}


def test_draws_are_put_together(shrunk: dict[str, Any]) -> None:
    one = {"method": "A", "seconds": 1.0, "peak_bytes": 5, "perplexity": 30.0, "ratio": 1.2}
    found = shrunk["row_of"](
        "0.2", [one, {**one, "seconds": 9.0, "perplexity": 36.0}, {**one, "perplexity": 33.0, "peak_bytes": 7}]
    )
    told = {"goal": "0.2", "perplexity": 33.0, "spread": 6.0, "seeds": 3, "seconds": 1.0, "peak_bytes": 7}
    assert found == one | told
    assert shrunk["row_of"]("0.2", [one, {**one, "perplexity": None}])["perplexity"] is None


def test_a_row_takes_the_place_of_the_one_made_alike(shrunk: dict[str, Any], tmp_path: Path) -> None:
    path, keep = tmp_path / "rows.json", shrunk["keep"]
    keep(path, "m", row("A", tasks={"arc": 0.5}), {"arc": 0.6})
    keep(path, "m", row("A", windows=8), {})
    keep(path, "m", row("A", perplexity=40.0), {})
    found = json.loads(path.read_text())
    assert found["rows"] == [row("A", windows=8), row("A", perplexity=40.0, tasks={"arc": 0.5})]
    assert found["dense"] == {"tasks": {"arc": 0.6}}
    with pytest.raises(SystemExit, match="has rows of m"):
        keep(path, "other", row("A"), {})


def test_none_is_lost_where_several_write(shrunk: dict[str, Any], tmp_path: Path) -> None:
    names = [f"M{place}" for place in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: shrunk["keep"](tmp_path / "rows.json", "m", row(name), {}), names))
    assert sorted(one["method"] for one in json.loads((tmp_path / "rows.json").read_text())["rows"]) == sorted(names)
