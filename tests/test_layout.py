"""The shape of the package: imports only go down, names are sorted, files are named for what they hold."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gossamer

ROOT = Path(gossamer.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part may import, besides itself. A part is a folder or a file right under the package.
METHODS = {"scores", "solvers", "formats", "penalties", "structures"}
LOWEST = {"core", "kernels"}
MODELS = {"data", "models", "evaluate", "timing"}  # these import hf where a directory is packed: that is what makes it loadable
TOP = {"cli", "html", "hf", "__main__"}
BELOW = {
    "core": set(),
    "kernels": {"core"},
    **dict.fromkeys(METHODS, LOWEST),
    **dict.fromkeys(MODELS, METHODS | LOWEST | MODELS | {"hf"}),
    "sites": METHODS | LOWEST | MODELS | {"hf"},
    "adapters": METHODS | LOWEST | MODELS | {"sites"},
    "tuners": METHODS | LOWEST | MODELS | {"sites", "adapters", "hf"},
    "tuning": METHODS | LOWEST | MODELS | {"sites", "tuners"},
    "merging": METHODS | LOWEST | MODELS | {"sites", "adapters"},
    "recovering": METHODS | LOWEST | MODELS | {"sites", "tuning", "tuners"},
    "catalogue": METHODS | LOWEST | MODELS | {"sites", "tuning"},
    "recipe": METHODS | LOWEST | MODELS | {"sites", "tuning", "tuners", "recovering", "speed"},
}
ALONE = METHODS  # the files (or folders) in these do not import one another


def parts(file: Path) -> tuple[str, ...]:
    """Return the dotted name of a file below the package: ``scores/wanda.py`` is ("scores", "wanda")."""
    names = file.relative_to(ROOT).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """Yield every module the file imports, wherever in it, by its dotted name."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.relative_to(ROOT)}: imports are absolute"
            module = tuple((node.module or "").split("."))
            for alias in node.names:
                yield (*module, alias.name) if module[0] == "gossamer" else module


def own(file: Path) -> Iterator[tuple[str, ...]]:
    """Yield what the file imports of the package, by its dotted name below the package."""
    yield from (name[1:] for name in imported(file) if name[0] == "gossamer" and name[1:] != ("__version__",))


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


def is_part(name: str) -> bool:
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


@pytest.mark.parametrize("file", [f for f in FILES if parts(f)], ids=label)
def test_imports_only_go_down(file: Path) -> None:
    part = parts(file)[0]
    everything = {parts(f)[0] for f in FILES if parts(f)}
    allowed = BELOW.get(part, everything if part in TOP else everything - TOP)
    for name in own(file):
        if not name or not is_part(name[0]):
            assert part in TOP, f"gossamer/{label(file)} imports gossamer itself"
        elif name[0] != part:
            assert name[0] in allowed, f"gossamer/{label(file)} may not import gossamer.{'.'.join(name)}"


@pytest.mark.parametrize("file", [f for f in FILES if parts(f)[:1] and parts(f)[0] in ALONE | {"kernels"}], ids=label)
def test_siblings_do_not_import_one_another(file: Path) -> None:
    here = parts(file)
    for name in own(file):
        if len(here) > 1 and len(name) > 1 and name[0] == here[0]:
            shared = here[0] == "kernels" and name[1].startswith("_")  # what all products use; one product uses no other
            shared = shared or (here[:2], name[:2]) == (("formats", "wrapped"), ("formats", "nm"))  # its core is one
            assert name[1] == here[1] or shared, f"gossamer/{label(file)} may not import gossamer.{'.'.join(name)}"


@pytest.mark.parametrize("file", [f for f in FILES if parts(f)[:1] == ("core",)], ids=label)
def test_core_is_torch_only(file: Path) -> None:
    outside = {name[0] for name in imported(file)} - {"gossamer", "torch"} - sys.stdlib_module_names
    assert not outside


def test_import_gossamer_loads_little_and_says_nothing() -> None:
    code = "import sys, gossamer; sys.exit(', '.join({'transformers', 'triton', 'peft'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("file", FILES, ids=label)
def test_only_the_adapters_build_on_peft(file: Path) -> None:
    of_peft = {name for name in imported(file) if name[0] == "peft"}
    assert not of_peft or parts(file)[0] in {"adapters", "tuners", "merging"}


def all_of(file: Path) -> list[str] | None:
    for node in tree(file).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


@pytest.mark.parametrize("file", [f for f in FILES if all_of(f) is not None], ids=label)
def test_all_is_sorted_and_resolves(file: Path) -> None:
    names = all_of(file)
    assert names == sorted(set(names), key=lambda n: (not n.isupper(), not n[0].isupper(), n)), "constants, classes, the rest"
    if file.stem == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    module = importlib.import_module(".".join(("gossamer", *parts(file))))
    for name in names:
        assert hasattr(module, name), name


@pytest.mark.parametrize("word", ["utils", "helpers", "manager", "handler", "factory"])
def test_nothing_is_named_for_holding_anything(word: str) -> None:
    assert not [path for path in ROOT.rglob("*") if word in path.name.lower() and "__pycache__" not in path.parts]
    defined = (n for f in FILES for n in ast.walk(tree(f)) if isinstance(n, ast.ClassDef | ast.FunctionDef))
    assert not [node.name for node in defined if word in node.name.lower()]


@pytest.mark.parametrize("package", ["scores", "solvers", "structures", "tuners"])
def test_a_method_is_one_file_with_one_documented_class(package: str) -> None:
    module = importlib.import_module(f"gossamer.{package}")
    found = []
    for file in sorted((ROOT / package).glob("*.py")):
        if file.stem.startswith("_"):
            continue
        public = [n for n in tree(file).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        assert len(public) == 1, f"{label(file)} defines one public class"
        assert public[0].name.lower() == file.stem
        document = ast.get_docstring(public[0]) or ""
        assert ">>> " in document, f"{public[0].name} has a docstring with a doctest"
        assert ast.get_docstring(tree(file)), f"{label(file)} has a docstring"
        found.append(public[0].name)
    assert sorted(found) == sorted(module.__all__)
