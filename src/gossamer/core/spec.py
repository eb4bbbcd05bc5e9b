"""One text grammar for methods, patterns, allocations and schedules: names, calls and literals, nothing else.

    Wanda        SparseGPT(damp=0.02)        Unstructured(per='row')        2:4        4x1        my.module:MyScore(a=1)

The same text serves Python, the command line, JSON and reports: ``parse(repr(x)) == x``.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from gossamer.core.errors import GossamerError

T = TypeVar("T")
_PATHS = re.compile(r"""'[^']*'|"[^"]*"|(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)""")


@dataclass_transform(frozen_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that is its own configuration: equal by value, its ``repr`` the text that makes it."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = show  # type: ignore[method-assign]
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


def show(x: object) -> str:
    """Write an object as its spec: ``Name`` where every field has its default, ``Name(field=value)`` otherwise."""
    if inspect.isfunction(x):
        return _path(x)
    if type(x).__repr__ is not show or not dataclasses.is_dataclass(x):  # 2:4 has a text of its own
        return repr(x)
    fields = [f for f in dataclasses.fields(x) if f.init]
    given = [f"{f.name}={show(getattr(x, f.name))}" for f in fields if getattr(x, f.name) != f.default]
    name = _path(type(x))
    return f"{name}({', '.join(given)})" if given else name


def _path(x: Any) -> str:
    """Return how a spec names a class or function: its name alone if it is ours."""
    return x.__name__ if x.__module__.startswith("gossamer.") else f"{x.__module__}:{x.__qualname__}"


@dataclasses.dataclass(frozen=True, repr=False)
class Bound:
    """A function with some of its keyword arguments fixed, so that ``owl(outlier=7.0)`` is a value with a text of its own."""

    function: Callable[..., Any]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.keywords))

    def __getattr__(self, name: str) -> Any:  # what the function declares (its needs), the bound function declares
        if name == "function":  # not yet set: copy and pickle ask before the fields exist
            raise AttributeError(name)
        return getattr(self.function, name)

    def __repr__(self) -> str:
        return f"{_path(self.function)}({', '.join(f'{k}={v!r}' for k, v in self.keywords)})"


def parse(text: str, names: Mapping[str, Any], what: str = "name") -> Any:
    """Read a spec.

    Args:
        text: the spec; a class name alone stands for an instance with its defaults.
        names: what each name may stand for (classes and functions), usually ``vars()`` of a package's public names.
        what: the word for these things in error messages ("method", "pattern").

    Raises:
        GossamerError: unknown name (with the nearest right ones), arguments the thing does not take, or any other syntax.

    >>> from gossamer.core.pattern import NM, Unstructured
    >>> parse("2:4", {"NM": NM}), parse("Unstructured(per='row')", {"Unstructured": Unstructured})
    (2:4, Unstructured(per='row'))
    """
    text = text.strip()
    for cls in names.values():
        shorthand = getattr(cls, "shorthand", None)
        if shorthand and (match := re.fullmatch(shorthand, text)):
            return _make(cls, [int(g) for g in match.groups()], {}, text, what)
    try:
        # "package.module:Class(...)": swap each path for a placeholder that Python's own grammar accepts.
        imported: dict[str, Any] = {}

        def swap(match: re.Match[str]) -> str:
            if match["module"] is None:  # a string literal
                return match[0]
            placeholder = f"_imported{len(imported)}"
            imported[placeholder] = _import(match["module"], match["name"], what)
            return placeholder

        tree = ast.parse(_PATHS.sub(swap, text), mode="eval").body
        names = {**names, **imported}
    except SyntaxError:
        raise GossamerError(f"cannot read the {what} {text!r}: write a name or a call, such as {_example(names)}") from None
    if not isinstance(tree, ast.Name | ast.Call):
        raise GossamerError(f"cannot read the {what} {text!r}: write a name or a call, such as {_example(names)}")
    return _value(tree, names, text, what)


def _value(node: ast.expr, names: Mapping[str, Any], text: str, what: str) -> Any:
    if isinstance(node, ast.Name):
        return _make(_look_up(node.id, names, what), [], {}, text, what)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(k.arg is None for k in node.keywords) or any(isinstance(a, ast.Starred) for a in node.args):
            raise GossamerError(f"cannot read the {what} {text!r}: * and ** have no place in it")
        args = [_value(a, names, text, what) for a in node.args]
        keywords = {str(k.arg): _value(k.value, names, text, what) for k in node.keywords}
        return _make(_look_up(node.func.id, names, what), args, keywords, text, what)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise GossamerError(f"cannot read the {what} {text!r}: only names, calls and literals are allowed") from None


def _look_up(name: str, names: Mapping[str, Any], what: str) -> Any:
    if name in names:
        return names[name]
    by_lower = {n.lower(): n for n in names if not n.startswith("_")}
    near = [by_lower[n] for n in difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(by_lower.values()))}"
    raise GossamerError(f"unknown {what} {name!r}; {hint}")


def _make(cls: Any, args: list[Any], keywords: dict[str, Any], text: str, what: str) -> Any:
    try:
        if inspect.isfunction(cls):
            free = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
            unknown = sorted(set(keywords) - set(free))
            if args or unknown:
                raise TypeError(f"it takes {', '.join(free) or 'no arguments'}, by name")
            return Bound(cls, tuple(sorted(keywords.items()))) if keywords else cls
        return cls(*args, **keywords)
    except TypeError as error:
        reason = str(error).replace(f"{getattr(cls, '__name__', cls)}.__init__() ", "")
        reason = "one of them is of the wrong type" if "not supported between" in reason else reason
        signature = inspect.signature(cls)
        raise GossamerError(f"cannot make the {what} {text!r}: {reason}; its signature is {signature}") from None


def _import(module: str, name: str, what: str) -> Any:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise GossamerError(f"cannot import the {what} {module}:{name}: {error}") from None
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise GossamerError(f"the {what} {module}:{name} is neither a class nor a function")
    return found


def _example(names: Mapping[str, Any]) -> str:
    return next((n for n in sorted(names) if not n.startswith("_")), "Name(field=1)")


def names_in(module: Any, kind: type | None = None) -> dict[str, Any]:
    """Return the public names a module offers to specs: its ``__all__``, or the subclasses of ``kind`` it defines."""
    if kind is None:
        return {name: getattr(module, name) for name in module.__all__}
    found = vars(module).items()
    return {
        n: v
        for n, v in found
        if inspect.isclass(v) and issubclass(v, kind) and v is not kind and v.__module__ == module.__name__
    }
