"""The command line: what it does, what it prints, and that a mistake is one line, exit status 2, and nothing on disk."""

import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer
from gossamer import cli, compare, models
from gossamer.sites import checkpoint
from gossamer.sites._job import ALLOCATIONS, METHODS, PATTERNS

SMALL = ["--seqlen", "16", "--samples", "4"]


@dataclass
class Done:
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Call the command line in this process."""

    def call(*words: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return Done(left.value.code if isinstance(left.value.code, int) else 1, said.out, said.err)

    return call


@pytest.fixture
def bright(tmp_path: Path) -> Path:
    """A text of some hundred tokens."""
    path = tmp_path / "bright.txt"
    path.write_text("".join(f"{i}. The spider spins a thin thread; gossamer is light and strong.\n" for i in range(80)))
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything in a folder: the bytes of files, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def process(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gossamer", *map(str, words)], capture_output=True, text=True, **options)


# What it does


def test_prune_gives_a_directory_that_plain_transformers_loads(run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "made" / "for" / "it"
    started = time.perf_counter()
    done = run("prune", tiny_dir, "--method", "SparseGPT", "--pattern", "2:4", "--data", "builtin", *SMALL, "--out", out)
    assert done.status == 0
    assert f"wrote {out}; next: gossamer eval {out}" in done.out
    assert done.err == "", "no bar where there is no terminal"
    model = AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    report = json.loads((out / "report.json").read_text())
    assert len(report["weights"]) == 14
    for row in report["weights"]:
        weight = model.get_parameter(row["name"])
        assert row["shape"] == list(weight.shape)
        assert row["nnz"] * 2 == weight.numel() == 2 * int(weight.count_nonzero())
        assert row["sparsity"] == 0.5
        assert (weight.view(-1, 4).count_nonzero(1) == 2).all()
    assert report["totals"]["sparsity"] == 0.5
    assert sorted(p.name for p in out.parent.iterdir()) == ["it"]
    assert 0 < report["seconds"]["total"] <= time.perf_counter() - started, "no second is counted twice"


@pytest.mark.parametrize("sample", ["first", "random"])
def test_how_windows_are_drawn_is_in_the_report(run: Any, tiny_dir: Path, tmp_path: Path, bright: Path, sample: str) -> None:
    asked = ["--method", "Wanda", "--pattern", "Unstructured(per='row')", "--sparsity", "0.25", "--targets", "*.mlp.*"]
    how = ["--data", bright, "--sample", sample, "--seed", "3", *SMALL]
    done = run("prune", tiny_dir, *asked, *how, "--quiet", "--out", tmp_path / "out")
    assert done == Done(0, "", "")
    report = gossamer.Report.load(tmp_path / "out" / "report.json")
    assert report.recipe["sample"] == sample
    assert (report.recipe["seed"], report.recipe["seqlen"], report.recipe["samples"]) == (3, 16, 4)
    assert all(".mlp." in row["name"] and row["sparsity"] == 0.25 for row in report.weights)


def test_the_commands_a_report_gives_makes_the_same_bits(run: Any, tiny_dir: Path, tmp_path: Path, bright: Path) -> None:
    asked = ["--method", "SparseGPT(damp=0.02)", "--pattern", "Unstructured", "--sparsity", str(1 / 3), "--data", bright]
    run("prune", tiny_dir, *asked, *SMALL, "--out", tmp_path / "out")
    import shlex

    command = shlex.split(json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["command"])
    assert command[0] == "gossamer"
    shutil.move(tmp_path / "out", tmp_path / "first")
    assert run(*command[1:]).status == 0
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_path_with_brackets_is_printed_as_it_is(run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a [bold]path[/bold] :smile:"
    done = run("prune", tiny_dir, "--method", "Magnitude", "--pattern", "2:4", "--out", f"{out}/")
    assert f"wrote {out};" in done.out


def test_eval(run: Any, tiny_dir: Path, tmp_path: Path, bright: Path) -> None:
    done = run("eval", tiny_dir, "--data", bright, "--seqlen", "16", "--windows", "5", "--json", tmp_path / "deep" / "e.json")
    assert (done.status, done.err) == (0, "")
    found = json.loads((tmp_path / "deep" / "e.json").read_text())
    assert (found["tokens"], found["seqlen"], found["windows"]) == (75, 16, 5)
    assert found["perplexity"] > 1
    assert f"perplexity {found['perplexity']:.4f} over 75 tokens, 5 windows of 16" in done.out


def test_eval_hands_tasks_to_lm_eval(run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, inside = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate = lambda **_: {"results": {"piqa": {"acc,none": 0.5}}}  # type: ignore[attr-defined]
    inside.TaskManager = lambda include_path=None: SimpleNamespace(all_tasks=["piqa"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", inside)
    done = run("eval", tiny_dir, "--tasks", "piqa", "--json", tmp_path / "t.json")
    assert done.status == 0
    assert "0.5000" in done.out
    assert json.loads((tmp_path / "t.json").read_text())["tasks"] == {"piqa": {"acc": 0.5}}
    done = run("eval", tiny_dir, "--tasks", "nosuch")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "lm-eval knows no task 'nosuch'" in done.err


COMPARE = ["--methods", "Magnitude; Wanda;SparseGPT(damp=0.02)", "--pattern", "Unstructured;2:4", "--sparsity", "0.5,0.75",
           "--windows", "4", *SMALL]  # fmt: skip


def test_compare_then_again_then_more(run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[str] = []
    original = compare.prune
    monkeypatch.setattr(compare, "prune", lambda *a, **k: (pruned.append(str(a[1:3])), original(*a, **k))[1])
    out = tmp_path / "cmp"
    done = run("compare", tiny_dir, *COMPARE, "--out", out, "--json", tmp_path / "c.json")
    assert done.status == 0
    assert len(pruned) == 9, "three methods at two sparsities, and at 2:4"
    document = json.loads((out / "compare.json").read_text())
    assert document == json.loads((tmp_path / "c.json").read_text())
    assert [(r["recipe"]["method"], r["recipe"]["sparsity"]) for r in document["runs"]][:3] == [
        ("Magnitude", 0.5), ("Wanda", 0.5), ("SparseGPT(damp=0.02)", 0.5)]  # fmt: skip
    assert all(abs(r["totals"]["sparsity"] - r["recipe"]["sparsity"]) < 1e-9 for r in document["runs"])
    assert all(r["evaluation"]["perplexity"] > 1 for r in document["runs"])
    assert document["command"].startswith("gossamer compare ")
    for word in ("SparseGPT(damp=0.02)", "Unstructured(per='tensor')", "0.7500", "dense", str(out / "index.html")):
        assert word in done.out, "the table says all of it, whatever the width"
    page = (out / "index.html").read_text()
    assert "SparseGPT" in page
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "index.html", "runs"]

    again = run("compare", tiny_dir, *COMPARE, "--out", out)
    assert again.status == 0
    assert len(pruned) == 9, "nothing is pruned twice"
    assert again.err.count("kept from the run before") == 10
    assert json.loads((out / "compare.json").read_text())["runs"] == document["runs"]

    assert run("compare", tiny_dir, *COMPARE, "--methods", "Magnitude", "--out", out, "--keep-models", "--quiet").status == 0
    assert len(pruned) == 12, "a model asked for later has to be made"
    assert sorted(p.name for p in (out / "models").iterdir()) == [
        "magnitude-2-4", "magnitude-unstructured-per-tensor-0.5", "magnitude-unstructured-per-tensor-0.75"]  # fmt: skip
    assert run("compare", tiny_dir, *COMPARE, "--methods", "Magnitude", "--out", out, "--allocate", "erk").status == 0
    assert len(pruned) == 14, "another allocation is another run; 2:4 leaves nothing to allocate"


def test_compare_over_all_methods_seeds_and_tasks(
    run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def answers(model: Any, tasks: str, *_: Any, **how: Any) -> dict[str, Any]:
        asked.append((tasks, how["limit"], bool((model.lm_head.weight != 0).any())))
        return {"piqa": {"acc": 0.5 + len(asked) / 1000}}

    monkeypatch.setattr(compare, "measured_tasks", answers)
    monkeypatch.setattr(compare, "known_tasks", lambda tasks, folder: None)
    out = tmp_path / "cmp"
    options = ["--pattern", "2:4", "--windows", "4", *SMALL, "--out", out, "--seeds", "2", "--tasks", "piqa", "--limit", "3"]
    assert run("compare", tiny_dir, "--methods", "Magnitude;Wanda", *options).status == 0
    document = json.loads((out / "compare.json").read_text())
    assert [(r["recipe"]["method"], r["recipe"].get("seed")) for r in document["runs"]] == [
        ("Magnitude", None), ("Wanda", 0), ("Wanda", 1)]  # fmt: skip
    assert document["runs"][1]["evaluation"]["perplexity"] != document["runs"][2]["evaluation"]["perplexity"]
    assert asked == [("piqa", 3, True)] * 3, "the dense model too, and of two seeds the first"
    assert document["dense"]["tasks"] == {"piqa": {"acc": 0.501}}

    done = run("compare", tiny_dir, "--methods", "all", *options)
    assert done.status == 0
    assert done.err.count("kept from the run before") == 4
    every = {r["recipe"]["method"] for r in json.loads((out / "compare.json").read_text())["runs"]}
    assert {method.partition("(")[0] for method in every} == METHODS.keys() - {"Mask", "ARMOR", "GQSA"}
    assert "left out: ARMOR(block=64) wants sizes that its block divides" in done.err
    lines = [line.split() for line in done.out.splitlines() if "2:4" in line]
    found = [float(line[line.index("2:4") + 2]) for line in lines]
    assert found == sorted(found), "the best first"
    assert "±" in done.out
    assert run("compare", tiny_dir, *options, "--seeds", "0").status == 2


def test_compare_sees_that_the_calibration_text_has_changed(run: Any, tiny_dir: Path, tmp_path: Path, bright: Path) -> None:
    asked = ["compare", tiny_dir, "--methods", "Wanda", "--pattern", "2:4", "--windows", "4", *SMALL, "--out", tmp_path / "c"]
    assert run(*asked, "--data", bright, "--eval-data", "builtin").status == 0
    bright.write_text(bright.read_text().swapcase())
    done = run(*asked, "--data", bright, "--eval-data", "builtin")
    assert done.status == 0
    assert "kept from the run before" not in done.err


def test_report_draws_runs_and_comparisons(run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    run("prune", tiny_dir, "--method", "Magnitude", "--pattern", "2:4", "--out", tmp_path / "out")
    saved, page = tmp_path / "out" / "report.json", tmp_path / "pages" / "page.html"
    done = run("report", saved, "-o", page)
    assert (done.status, done.out) == (0, f"wrote {page}\n")
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    first = page.read_bytes()
    assert run("report", saved, "-o", page).status == 2
    assert run("report", saved, "-o", page, "--force").status == 0
    assert page.read_bytes() == first


def test_ls_names_everything_with_its_needs(run: Any) -> None:
    from gossamer.core import schedule

    done = run("ls")
    assert done.status == 0
    listed = {re.split(r"[ (]", line)[0]: line for line in done.out.splitlines() if line.strip()}
    for name in [*METHODS, *PATTERNS, *ALLOCATIONS, *schedule.__all__]:
        assert name in listed
    for name, method in METHODS.items():
        if isinstance(method.needs, frozenset):
            assert all(need in listed[name] for need in method.needs), name
    assert all(pattern in listed["SparseGPT"] for pattern in ("Unstructured", "NM"))
    assert "any" in listed["Wanda"]
    assert "given[name]" in done.out, "brackets are no markup"
    only = run("ls", "patterns").out
    assert "TopK" in only
    assert "Wanda" not in only


def test_help_and_version(run: Any) -> None:
    assert "Usage" in run().out
    done = run("--version")
    assert (done.status, done.out) == (0, f"gossamer {gossamer.__version__}\n")
    for command in (
        "prune",
        "eval",
        "compare",
        "sweep",
        "report",
        "ls",
        "demo",
        "bench",
        "plan",
        "generate",
        "timings",
        "unpack",
        "recover",
        "run",
    ):
        done = run(command, "--help")
        assert done.status == 0
        assert "Usage" in done.out


def test_demo_says_what_it_does_and_what_is_next(
    run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare.compare
    monkeypatch.setattr(models, "resolve", lambda model, say=None: tiny_dir if model == "smollm2" else Path(model))
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gossamer.timing.ROTATE_BYTES", {"cpu": 1 << 12})
    small = {"seqlen": 16, "samples": 4}
    monkeypatch.setattr(compare, "compare", lambda *a, **k: original(*a, **k, **small))
    out = tmp_path / "demo"
    done = run("demo", "--out", out)
    assert done.status == 0
    first, last = done.err.splitlines()[:3], done.err.splitlines()[-9:]
    assert all(word in " ".join(first) for word in ("SmolLM2", "Magnitude, Wanda and SparseGPT", "50 %", "2:4", "minutes"))
    assert str(out / "index.html") in " ".join(last)
    suggested = re.findall(r"gossamer eval (\S+)", " ".join(last))
    assert suggested
    assert Path(suggested[0]).is_dir(), "what it says to type next is there"
    assert len(list((out / "models").iterdir())) == 6
    runs = json.loads((out / "compare.json").read_text())["runs"]
    assert len(runs) == 6
    assert all(run["speed"]["dense"] > 0 and run["speed"]["packed"] > 0 for run in runs)
    assert "tokens/s dense → packed" in done.out
    assert 'data-chart="trade"' in (out / "index.html").read_text()
    assert run("eval", suggested[0], "--windows", "2", "--seqlen", "16").status == 0
    assert "kept from the run before" in run("demo", "--out", out).err
    assert run("demo", "--out", out, "--quiet").err == ""


# As a process of its own


def test_as_a_process_it_prints_no_bar_into_a_pipe(tiny_dir: Path, tmp_path: Path) -> None:
    asked = ["--method", "Wanda", "--pattern", "2:4", "--data", "builtin", *SMALL]
    done = process("prune", tiny_dir.name, *asked, "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "config.json").exists()
    done = process("prune", tiny_dir.name, *asked, "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"gossamer: the output directory out is not empty; .*--force.*\n", done.stderr)


def test_on_a_terminal_there_is_a_bar(tiny_dir: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    asked = ["prune", tiny_dir, "--method", "Magnitude", "--pattern", "2:4", "--out", tmp_path / "out"]
    subprocess.run([sys.executable, "-m", "gossamer", *map(str, asked)], stderr=theirs, stdout=subprocess.DEVNULL, check=True)
    os.write(theirs, b"end")
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "Magnitude 2:4" in said
    assert "0/14" in said


def test_quiet_shows_no_bar_even_on_a_terminal(
    run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    asked = ["prune", tiny_dir, "--method", "Magnitude", "--pattern", "2:4"]
    assert run(*asked, "--out", tmp_path / "quiet", "--quiet").err == ""


# What it refuses


def config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return change


def put(name: str, value: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[name].view(-1)[0].fill_(value))


def without(*files: str) -> Callable[[Path], None]:
    return lambda model: [(model / file).unlink() for file in files] and None


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 40) + b"{" * 40 + path.read_bytes()[48:])


def pickled(model: Path) -> None:
    torch.save({}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def used(model: Path) -> None:
    (model.parent / "out").mkdir()
    (model.parent / "out" / "mine.txt").write_text("mine")


def writes(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model.parent / name).write_text(text) and None


UP = "model.layers.1.mlp.up_proj.weight"
PRUNE = ["prune", "{model}", "--method", "Magnitude", "--pattern", "2:4", "--out", "{tmp}/new/out"]
WANDA = [*PRUNE, "--method", "Wanda", "--data", "builtin", *SMALL]
LOOSE = [*PRUNE, "--pattern", "Unstructured"]
EVAL = ["eval", "{model}", "--windows", "2", "--seqlen", "16", "--json", "{tmp}/e.json"]
MANY = ["compare", "{model}", "--windows", "2", *SMALL, "--out", "{tmp}/cmp"]

# what is done to the model first, the command line, what the one line says
BAD: dict[str, tuple[Callable[[Path], Any] | None, list[str], str]] = {
    "method": (None, [*PRUNE, "--method", "Wandaa"], "unknown method 'Wandaa'; did you mean Wanda"),
    "method's argument's type": (None, [*PRUNE, "--method", "SparseGPT(damp='x')"], "one of them is of the wrong type"),
    "method's argument": (None, [*PRUNE, "--method", "SparseGPT(dampp=1)"], "dampp"),
    "method of no module": (None, [*PRUNE, "--method", "no.such:Score"], "cannot import the method no.such:Score"),
    "pattern": (None, [*PRUNE, "--pattern", "Unstructred"], "unknown pattern 'Unstructred'; did you mean Unstructured"),
    "pattern's numbers": (None, [*PRUNE, "--pattern", "4:2"], "0 < n < m; got 4:2"),
    "model": (None, ["prune", "nosuch", *PRUNE[2:]], "no model 'nosuch': give a directory"),
    "model path": (None, ["prune", "{tmp}/nosuch", *PRUNE[2:]], "no model directory .*/nosuch: it does not exist"),
    "hub model": (None, ["prune", "owner/no-such-model-here", *PRUNE[2:], "--quiet"], "no model 'owner/no-such-model-here'"),
    "data file": (None, [*WANDA, "--data", "{tmp}/no.txt"], "no data .*no.txt.*: there is no such file"),
    "data not UTF-8": (lambda m: (m.parent / "b.txt").write_bytes(b"\xff"), [*WANDA, "--data", "{tmp}/b.txt"], "not UTF-8"),
    "sparsity 1": (None, [*LOOSE, "--sparsity", "1"], r"in \[0, 1\); got 1.0"),
    "sparsity below 0": (None, [*LOOSE, "--sparsity", "-0.1"], r"in \[0, 1\); got -0.1"),
    "sparsity NaN": (None, [*LOOSE, "--sparsity", "nan"], r"in \[0, 1\); got nan"),
    "sparsity no number": (None, [*LOOSE, "--sparsity", "half"], "'--sparsity'.*number|'half' is not a valid float"),
    "no sparsity": (None, LOOSE, "needs a sparsity"),
    "1:4 at 0.5": (None, [*PRUNE, "--pattern", "1:4", "--sparsity", "0.5"], "fixes its own sparsity at 0.75.*contradicts 0.5"),
    "allocation": (None, [*LOOSE, "--sparsity", "0.5", "--allocate", "erkk"], "unknown allocation 'erkk'; did you mean erk"),
    "no data": (None, [*PRUNE, "--method", "Wanda"], "Wanda needs calibration data"),
    "allocation's number": (
        None, [*WANDA, "--pattern", "Unstructured", "--sparsity", "0.5", "--allocate", "owl(spread=5)"], "spread in",
    ),
    "no data to allocate": (None, [*LOOSE, "--sparsity", "0.5", "--allocate", "owl"], "allocate=owl needs calibration data"),
    "short text": (
        writes("s.txt", "0123"), [*WANDA, "--data", "{tmp}/s.txt"],
        "the text has [1-9] tokens, and one window of seqlen 16 needs 16",
    ),
    "few windows": (
        writes("s.txt", "0123456789 " * 20), [*WANDA, "--data", "{tmp}/s.txt"],
        "has [1-9] windows of 16 tokens, fewer than the [0-9]+ samples asked for",
    ),
    "long windows": (None, [*WANDA, "--seqlen", "129"], "windows of 129 tokens are longer than the 128"),
    "no samples": (None, [*WANDA, "--samples", "0"], "samples is a positive integer"),
    "sample": (None, [*PRUNE, "--sample", "some"], "'--sample': .*'some' is not one of 'first', 'random'"),
    "seed": (None, [*WANDA, "--seed", str(2**70)], "seed is an integer from 0"),
    "targets": (None, [*PRUNE, "--targets", "*.nothing"], r"no weight matches '\*.nothing'; there are mlp.down_proj.weight, "),
    "target outside": (None, [*WANDA, "--targets", "lm_head"], "lm_head.weight stands outside the blocks"),
    "N:M": (None, [*PRUNE, "--pattern", "2:5"], r"q_proj.weight: the pattern 2:5 .* 5 divides; shape \(32, 32\)"),
    "block": (None, [*LOOSE, "--pattern", "3x1", "--sparsity", "0.5"], r"rows that 3 divides.*shape \(32, 32\)"),
    "solver's pattern": (None, [*WANDA, "--method", "SparseGPT", "--pattern", "4x1", "--sparsity", "0.5"], "not for 4x1"),
    "NaN": (put(UP, float("nan")), PRUNE, rf"{UP}: 1 of 2048 weights are NaN or infinite"),
    "NaN, calibrated": (put(UP, float("inf")), WANDA, rf"{UP}: 1 of 2048 weights are NaN or infinite"),
    "truncated": (truncated, PRUNE, r"model.safetensors is truncated or corrupt"),
    "corrupt header": (corrupt, PRUNE, r"model.safetensors is truncated or corrupt"),
    "weight missing": (weights(lambda t: t.pop(UP)), PRUNE, f"1 weights are missing from its files, the first is {UP}"),
    "embedding missing": (weights(lambda t: t.pop("model.embed_tokens.weight")), PRUNE, "missing.*embed_tokens"),
    "weight's shape": (weights(lambda t: t.update({UP: torch.ones(3, 4)})), PRUNE, f"another shape.*{UP}"),
    "shard missing": (
        lambda m: (m / models.INDEX).write_text(json.dumps({"weight_map": {"a": "b.safetensors"}})), PRUNE, "lacks the shard b",
    ),
    "no model": (without("config.json"), PRUNE, "no model directory: no config.json"),
    "no weights": (without("model.safetensors"), PRUNE, "holds no weights"),
    "config no JSON": (lambda m: (m / "config.json").write_text("{"), PRUNE, "config.json is not JSON"),
    "config's type": (config(model_type="nosuch"), PRUNE, "cannot read the config"),
    "config's values": (config(hidden_size="wide"), PRUNE, "cannot read the config.*hidden_size"),
    "foreign code": (config(model_type="own", auto_map={"AutoConfig": "own.Own"}), PRUNE, "cannot read the config"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), WANDA, "has no tokenizer"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), WANDA, "cannot load the tokenizer"),
    "output in use": (used, [*PRUNE, "--out", "{tmp}/out"], "not empty; .*--force"),
    "output a file": (writes("out", "mine"), [*PRUNE, "--out", "{tmp}/out"], "is a file; give a directory"),
    "output under a file": (writes("out", "mine"), [*PRUNE, "--out", "{tmp}/out/deep"], "cannot write"),
    "output the model": (None, [*PRUNE, "--out", "{model}", "--force"], "is the model itself"),
    "output over the model": (None, [*PRUNE, "--out", "{tmp}", "--force"], "holds the model"),
    "output a link to the model": (
        lambda m: (m.parent / "link").symlink_to(m), [*PRUNE, "--out", "{tmp}/link", "--force"], "is the model itself",
    ),
    "output here": (None, [*PRUNE, "--out", "."], "is the directory you are in"),
    "a pickle": (
        lambda m: torch.save({}, m.parent / "w.bin"), ["prune", "{tmp}/w.bin", *PRUNE[2:]], "never loaded; convert it",
    ),
    "only pickles": (pickled, PRUNE, r"only pickled weights \(pytorch_model.bin\)"),
    "device": (None, [*PRUNE, "--device", "gpu"], "the device 'gpu' cannot be used here"),
    "device without numbers": (None, [*EVAL, "--device", "meta"], "the device 'meta' cannot be used here"),
    "command": (None, ["prnue"], "No such command 'prnue'"),
    "option": (None, [*PRUNE, "--patern", "2:4"], "No such option: --patern"),
    "missing option": (None, ["prune", "{model}", "--method", "Magnitude"], "Missing option '--pattern'"),
    "missing model": (None, ["prune"], "Missing argument 'MODEL'"),
    "eval model": (None, ["eval", "{tmp}"], "no model directory"),
    "eval windows": (None, [*EVAL, "--windows", "0"], "windows is a positive integer"),
    "eval too many windows": (None, [*EVAL, "--windows", "10000000"], "fewer than the 10000000 asked for"),
    "eval seqlen 1": (None, [*EVAL, "--seqlen", "1"], "seqlen is at least 2"),
    "eval batch": (None, [*EVAL, "--batch", "0"], "batch is a positive integer"),
    "eval long windows": (None, [*EVAL, "--seqlen", "129"], "windows of 129 tokens are longer than the 128"),
    "eval json under a file": (writes("ev", "mine"), [*EVAL, "--json", "{tmp}/ev/x.json"], "write .*x.json: .*ev is a file"),
    "eval limit": (None, [*EVAL, "--limit", "3"], "--limit and --tasks-dir are for --tasks"),
    "eval json": (None, [*EVAL, "--json", "{tmp}"], "is a directory; give a file"),
    "eval short text": (writes("s.txt", "0"), [*EVAL, "--data", "{tmp}/s.txt"], "has 1 tokens, and one .* needs 16"),
    "compare method": (None, [*MANY, "--methods", "Magnitude;Wandaa"], "unknown method 'Wandaa'"),
    "compare nothing": (None, [*MANY, "--methods", ";"], "at least one method"),
    "compare sparsity": (None, [*MANY, "--sparsity", "0.5,half"], "--sparsity wants fractions separated by commas"),
    "compare sparsities": (None, [*MANY, "--sparsity", "0.5,1.5"], r"in \[0, 1\); got 1.5"),
    "compare no sparsity": (None, [*MANY, "--sparsity", ","], "needs a sparsity"),
    "compare N:M": (None, [*MANY, "--pattern", "Unstructured;2:5"], "5 divides"),
    "compare targets": (None, [*MANY, "--targets", "nothing"], "no weight matches"),
    "compare samples": (None, [*MANY, "--samples", "1000000"], "fewer than the 1000000 samples"),
    "compare NaN": (put(UP, float("nan")), MANY, "NaN or infinite"),
    "compare truncated": (truncated, MANY, "truncated or corrupt"),
    "compare into the model": (None, [*MANY, "--out", "{model}"], "is the model itself"),
    "compare into another model": (lambda m: shutil.copytree(m, m.parent / "cmp"), MANY, "is the directory of a model"),
    "compare into a file": (writes("cmp", "mine"), MANY, "is a file"),
    "report of nothing": (None, ["report", "{tmp}/no.json"], "cannot read .*no.json: No such file"),
    "report of no JSON": (writes("a.json", "{"), ["report", "{tmp}/a.json", "-o", "{tmp}/p.html"], "a.json is not JSON"),
    "report of another": (writes("a.json", '{"a": 1}'), ["report", "{tmp}/a.json", "-o", "{tmp}/p.html"], "report"),
    "report of a list": (writes("a.json", "[]"), ["report", "{tmp}/a.json", "-o", "{tmp}/p.html"], "report"),
    "report in use": (writes("p.html", "mine"), ["report", "{tmp}/a.json", "-o", "{tmp}/p.html"], "p.html exists; .*--force"),
    "ls": (None, ["ls", "methods"], "value for 'kind': 'methods' is not one of 'scores'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_leaves_nothing(
    case: str, run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, command, told = BAD[case]
    if change:
        change(tiny_dir)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    done = run(*(word.format(model=tiny_dir, tmp=tmp_path) for word in command))
    assert done.status == 2, done
    assert done.err.startswith("gossamer: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert re.search(told, done.err), done.err
    assert done.out == ""
    assert tree(tmp_path) == before, "nothing is created, nothing is changed"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tasks_without_lm_eval(run: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("eval", tiny_dir, "--tasks", "piqa")
    assert done.status == 2
    assert done.err == "gossamer: tasks need the package lm-eval: pip install lm-eval\n"


def test_an_interrupted_run_says_so_and_goes_on(
    run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ["--method", "Wanda", "--pattern", "2:4", "--data", "builtin", *SMALL]
    asked = ["prune", tiny_dir, *method, "--out", tmp_path / "a" / "b"]
    fetch = checkpoint.Checkpoint.fetch

    def interrupted_at(block: int) -> Callable[..., None]:
        def method(self: Any, name: str, index: int) -> None:
            if index == block:
                raise KeyboardInterrupt
            fetch(self, name, index)

        return method

    monkeypatch.setattr(checkpoint.Checkpoint, "fetch", interrupted_at(0))
    done = run(*asked)
    assert (done.status, done.out) == (130, "")
    assert done.err.startswith("gossamer: interrupted")
    assert not (tmp_path / "a").exists(), "nothing was finished, and nothing is kept"
    monkeypatch.setattr(checkpoint.Checkpoint, "fetch", interrupted_at(1))
    assert run(*asked).status == 130
    assert (tmp_path / "a" / ".b.partial" / "state.json").exists()
    monkeypatch.setattr(checkpoint.Checkpoint, "fetch", interrupted_at(0))  # which is not read again
    assert run(*asked).status == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b"]


def test_of_two_runs_into_one_directory_the_second_is_refused(
    run: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["prune", tiny_dir, "--method", "Magnitude", "--pattern", "2:4", "--out", tmp_path / "out"]
    fetch, seen = checkpoint.Checkpoint.fetch, []

    def meanwhile(self: Any, name: str, index: int) -> None:
        if not seen:
            seen.append(process(*asked))
        fetch(self, name, index)

    monkeypatch.setattr(checkpoint.Checkpoint, "fetch", meanwhile)
    assert run(*asked).status == 0
    assert seen[0].returncode == 2
    assert re.fullmatch(r"gossamer: another run is writing .*/out now; .*\n", seen[0].stderr)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]


@pytest.mark.parametrize("there", [True, False])
def test_a_linked_output_stays_a_link(there: bool, run: Any, tiny_dir: Path, tmp_path: Path) -> None:
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    asked = ["prune", tiny_dir, "--method", "Magnitude", "--pattern", "2:4", "--out", tmp_path / "out"]
    assert run(*asked).status == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()
    assert run(*asked).status == 2
    assert run(*asked, "--force").status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out", "tiny"]
