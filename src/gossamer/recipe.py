"""Recipe: steps that lead from a model to a smaller one, in a file; a run that was killed goes on where it stopped."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from gossamer.core.atomic import lock, write_text
from gossamer.core.errors import GossamerError
from gossamer.core.report import FORMAT, environment, read_json
from gossamer.data import evaluation as evaluation_windows
from gossamer.data import texts
from gossamer.evaluate import check_ids, perplexity
from gossamer.models import causal_lm, resolve, skeleton, tokenizer
from gossamer.recovering import read, recover
from gossamer.sites._job import Job, pattern_of
from gossamer.sites._rows import describe
from gossamer.sites._shrinking import shrink_checkpoint
from gossamer.sites.checkpoint import prune_checkpoint, save
from gossamer.sites.shrinking import goal_of, structure_of
from gossamer.speed import decoding

Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """A verb and its arguments, as JSON values."""

    verb: str
    how: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A model and the steps it goes through: prune, shrink, recover, evaluate, pack, in any order that makes sense.

        {"model": "smollm2", "steps": [
          {"prune": {"method": "SparseGPT", "pattern": "2:4", "data": "builtin"}},
          {"recover": {"method": "Full", "data": "builtin", "steps": 100}},
          {"evaluate": {"data": "builtin", "windows": 32}},
          {"pack": {}}]}

    Raises:
        GossamerError: it is no recipe, or a step has an argument that its verb does not take or misses one it needs.

    >>> Recipe.from_json({"model": "smollm2", "steps": [{"prune": {"method": "Magnitude", "pattern": "2:4"}}]}).steps[0].verb
    'prune'
    """

    model: str
    steps: tuple[Step, ...]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read a recipe, and check all of it that shows without its model."""
        if not isinstance(value, dict) or set(value) != {"model", "steps"} or not isinstance(value["steps"], list):
            raise GossamerError('a recipe is an object with "model" and "steps", a list of objects such as {"prune": {...}}')
        steps = []
        for place, step in enumerate(value["steps"], 1):
            if not isinstance(step, dict) or len(step) != 1 or not isinstance(next(iter(step.values())), dict):
                raise GossamerError(
                    f'step {place} of the recipe is no object of one verb and its arguments: {{"prune": {{...}}}}'
                )
            verb, how = next(iter(step.items()))
            _check(place, verb, how)
            steps.append(Step(verb, how))
        if not steps:
            raise GossamerError("the recipe has no steps")
        if steps[0].verb not in ("prune", "shrink", "recover"):
            raise GossamerError(
                f"the recipe begins with {steps[0].verb}: there is nothing sparse before the first prune, shrink or recover"
            )
        return cls(str(value["model"]), tuple(steps))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe from a JSON file."""
        return cls.from_json(read_json(Path(path)))

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "steps": [{step.verb: dict(step.how)} for step in self.steps]}


def run(
    recipe: Recipe,
    folder: Path,
    *,
    device: str | None = None,
    force: bool = False,
    command: str | None = None,
    progress: bool | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Take a model through a recipe; each step's result is in ``folder``, and finished steps are not done again.

    Args:
        folder: receives a directory for each step that makes a model (``1-prune``, ``2-recover``, ``4-pack``) and recipe.json.
        force: start over.
        device: where to compute, as in `prune`.

    Returns:
        One JSON object of kind "compare", a run for each model that was made, which a page can be drawn from.

    Raises:
        GossamerError: another recipe was begun in ``folder`` (what differs is named), or a step cannot be done.
    """
    if folder.exists() and not folder.is_dir():
        raise GossamerError(f"the output {folder} is a file; give a directory")
    kept = folder / "recipe.json"
    hold = lock(folder, folder)
    try:
        made: list[dict[str, Any]] = []
        if kept.exists() and not force:
            made = _finished(recipe, read_json(kept))
        source = resolve(recipe.model, say=say)
        bench = _Bench(recipe, source, folder, device, progress, say)
        bench.look(recipe.steps[len(made) :], len(made) + 1)
        for place, step in enumerate(recipe.steps, 1):
            if place <= len(made):
                say(f"{place} {step.verb}: kept from the run before")
                bench.take(place, step, made[place - 1])
                continue
            say(f"{place} {step.verb}")
            made.append(bench.do(place, step))
            write_text(kept, json.dumps({**recipe.to_json(), "made": made}, indent=1) + "\n")
        return bench.document(command)
    finally:
        hold.close()


class _Bench:
    """Where a recipe stands: the directory of the model as it is now, and the reports so far."""

    def __init__(self, recipe: Recipe, source: Path, folder: Path, device: str | None, progress: bool | None, say: Say) -> None:
        self.recipe, self.source, self.folder, self.say = recipe, source, folder, say
        self.here, self.pattern = source, None  # type: Path, str | None
        self.how: dict[str, Any] = {"device": device, "progress": progress}
        self.dense: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []

    def look(self, steps: Sequence[Step], first: int) -> None:
        """Raise where the text of a step is not there, or too short to evaluate on, before any work and not after hours."""
        for place, step in enumerate(steps, first):
            try:
                if step.verb == "evaluate":
                    self._ids(**step.how)
                elif text := step.how.get("data"):
                    texts(text, split="calibration")
                if other := step.how.get("evaluate"):
                    texts(other, split="evaluation")
            except GossamerError as error:
                raise GossamerError(f"step {place} of the recipe: {error}") from None

    def do(self, place: int, step: Step) -> dict[str, Any]:
        """Do a step, and return what has to be kept of it."""
        out = self.folder / f"{place}-{step.verb}"
        if step.verb == "prune":
            report = prune_checkpoint(self.here, out, **step.how, **self.how, name=self.recipe.model, force=True)
            found = report.to_json()
        elif step.verb == "shrink":
            report = shrink_checkpoint(self.here, out, **step.how, **self.how, name=self.recipe.model, force=True)
            found = report.to_json()
        elif step.verb == "recover":
            teacher = {"teacher": str(self.source)} if self.here != self.source else {}
            how = {**teacher, **step.how, **self.how, "name": self.recipe.model}
            found = recover(self.here, out, **how, force=not self._half(out)).to_json()
        elif step.verb == "evaluate":
            found = self._evaluate(**step.how)
        else:
            found = self._pack(out, **step.how)
        self.take(place, step, found)
        return found

    def take(self, place: int, step: Step, found: dict[str, Any]) -> None:
        """Go on from a step's result."""
        if step.verb in ("prune", "shrink", "recover"):
            self.here = self.folder / f"{place}-{step.verb}"
            if not self.here.is_dir():
                raise GossamerError(f"{self.here} is gone, and the steps after it need it: --force starts over")
            recipe, before = found["recipe"], self.runs[-1]["recipe"]["pattern"] if self.runs else None
            own = recipe["pattern"]  # none where structure was removed
            if step.verb == "prune" or own != before:
                mixed = own is not None and pattern_of(own).grain is not None and recipe.get("allocate", "uniform") != "uniform"
                self.pattern = None if mixed else own  # an n of its own for each weight: packed as a bitmask
            self.runs.append(found)
        elif step.verb == "evaluate":
            self.dense = found["dense"]
            self.runs[-1] = {**self.runs[-1], "evaluation": found["evaluation"]}
        else:
            self.runs[-1] = {**self.runs[-1], "speed": found["speed"]}

    def _half(self, out: Path) -> bool:
        return (out.with_name(f".{out.name}.training") / "training.json").exists()

    def _evaluate(self, data: str = "builtin", seqlen: int = 512, windows: int | None = None) -> dict[str, Any]:
        ids = self._ids(data, seqlen, windows)
        found = {}
        for name, path in (("dense", self.source), ("evaluation", self.here)):
            model = causal_lm(path, device=self.how["device"])
            found[name] = {**perplexity(model, ids), "data": data, "bytes": describe(model)["bytes"]}
        return found

    def _ids(self, data: str = "builtin", seqlen: int = 512, windows: int | None = None) -> Tensor:
        ids = evaluation_windows(data, tokenizer(self.source), seqlen=seqlen, first=windows)
        check_ids(skeleton(self.source), ids)
        return ids

    def _pack(self, out: Path, batch: int = 1, context: int = 128) -> dict[str, Any]:
        model = causal_lm(self.here, device=self.how["device"])
        shape = pattern_of(self.pattern) if self.pattern else None
        speed = decoding(model, shape, batch=batch, context=context, progress=self.how["progress"])
        self.say(speed["said"])
        save(causal_lm(self.here), out, packed=True, tokenizer=tokenizer(self.here), force=True)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        return {"speed": speed, "file_bytes": size}

    def document(self, command: str | None) -> dict[str, Any]:
        last = self.runs[-1]
        evaluated = self.dense.get("data")
        return {
            "format": FORMAT,
            "kind": "compare",
            "command": command,
            "model": {**last["model"], "name": self.recipe.model},
            "environment": environment(),
            "data": {"calibration": self.recipe.steps[0].how.get("data"), "evaluation": evaluated},
            "dense": self.dense or None,
            "runs": self.runs,
        }


def _takes(function: Callable[..., Any], *without: str) -> tuple[set[str], set[str]]:
    """Return the arguments that a recipe may give a verb, and those that it must."""
    found = {name: p for name, p in inspect.signature(function).parameters.items() if name not in ("self", *without)}
    return set(found), {name for name, p in found.items() if p.default is p.empty}


_NOT_HERE = ("source", "out", "device", "progress", "force", "name", "say")
VERBS = {
    "prune": _takes(prune_checkpoint, *_NOT_HERE),
    "shrink": _takes(shrink_checkpoint, *_NOT_HERE),
    "recover": _takes(recover, *_NOT_HERE),
    "evaluate": _takes(_Bench._evaluate),
    "pack": _takes(_Bench._pack, "out"),
}


def _check(place: int, verb: str, how: Mapping[str, Any]) -> None:
    if verb not in VERBS:
        raise GossamerError(f"step {place} of the recipe: unknown verb {verb!r}; known: {', '.join(VERBS)}")
    may, must = VERBS[verb]
    if unknown := sorted(set(how) - may):
        raise GossamerError(f"step {place} of the recipe: {verb} takes no {unknown[0]!r}; it takes {', '.join(sorted(may))}")
    if missing := sorted(must - set(how)):
        raise GossamerError(f"step {place} of the recipe: {verb} wants {', '.join(missing)}")
    try:
        if verb == "prune":
            Job.of(how["method"], how["pattern"], how.get("sparsity"), how.get("allocate", "uniform"))
        elif verb == "shrink":
            goal_of(structure_of(how["method"]), how.get("sparsity"), how.get("speedup"), how.get("at", (1, 512)))
        elif verb == "recover":
            read(how.get("method", "Full"), how.get("pattern"), how.get("sparsity"), how["steps"])
        for key in ("data", "evaluate"):
            if not isinstance(text := how.get(key), str | None):
                raise GossamerError(f"{verb} wants {key} to be the name of a text; got {text!r}")
        for key in {"pack": ("batch", "context"), "evaluate": ("seqlen", "windows")}.get(verb, ()):
            if (n := how.get(key)) is not None and (type(n) is not int or n < 1):
                raise GossamerError(f"{verb} wants {key} to be an integer, at least 1; got {n!r}")
    except GossamerError as error:
        raise GossamerError(f"step {place} of the recipe: {error}") from None


def _finished(recipe: Recipe, found: Any) -> list[dict[str, Any]]:
    """Return what was made of the first steps, if they were the same ones."""
    made: list[dict[str, Any]] = found["made"]
    then = Recipe.from_json({key: found[key] for key in ("model", "steps")})
    if then.model != recipe.model:
        raise GossamerError(f"this recipe was begun with the model {then.model}, not {recipe.model}; --force starts over")
    if len(made) > len(recipe.steps):
        raise GossamerError(f"{len(made)} steps are done, and the recipe has {len(recipe.steps)}; --force starts over")
    for place, (was, now) in enumerate(zip(then.steps[: len(made)], recipe.steps, strict=False), 1):
        if was != now:
            raise GossamerError(f"step {place} is done and was another: {_differing(was, now)}; --force starts over")
    return made


def _differing(was: Step, now: Step) -> str:
    if was.verb != now.verb:
        return f"{was.verb} was it, and not {now.verb}"
    keys: Sequence[str] = [key for key in {**was.how, **now.how} if was.how.get(key) != now.how.get(key)]
    return ", ".join(f"{key} was {was.how.get(key)!r} and is {now.how.get(key)!r}" for key in keys)
