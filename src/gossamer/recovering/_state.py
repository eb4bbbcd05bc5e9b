"""Where a run of training stands, on disk: so that a killed one goes on with the very same bits."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.core.atomic import cannot_write, lock, replacing, write_text
from gossamer.core.errors import GossamerError
from gossamer.core.report import read_json

DIGESTS = ("the text", "the model")  # what a recipe has of these is a number that says nothing


class State:
    """The folder ``.OUT.training`` beside a result: what the run is, how far it came, and its tensors.

    ``told`` is what the run has to tell so far: a loss a step, or a row a block.

    As a context it holds the folder for itself; it is removed when the run has ended, or is ``over`` by an error, or before
    its first state was kept.

    Raises:
        GossamerError: a run with another recipe stands there, or one that is running now.
    """

    def __init__(self, out: Path, recipe: Mapping[str, Any], *, force: bool) -> None:
        self.out, self.folder = out, out.with_name(f".{out.name}.training")
        self.recipe, self.force = json.loads(json.dumps(recipe)), force
        self.step, self.told, self.seconds = 0, list[Any](), 0.0
        self.kept, self.over = time.perf_counter(), False

    def __enter__(self) -> Self:
        try:
            self._lock = lock(self.folder, self.out)
            file = self.folder / "training.json"
            if file.exists() and not self.force:
                self._go_on(read_json(file))
            else:
                for remains in self.folder.iterdir():
                    if remains.name != "lock":
                        shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
        except OSError as error:
            raise cannot_write(self.out, error) from error
        except GossamerError:
            if hasattr(self, "_lock"):
                self._lock.close()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if kind is None or self.over or not (self.folder / "training.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _go_on(self, found: dict[str, Any]) -> None:
        theirs = found["recipe"]
        differing = [key for key in {**theirs, **self.recipe} if theirs.get(key) != self.recipe.get(key)]
        if differing:
            told = ", ".join(
                f"{key} changed" if key in DIGESTS else f"{key} was {theirs.get(key)} and is {self.recipe.get(key)}"
                for key in differing[:3]
            )
            raise GossamerError(
                f"a run for {self.out} stopped at step {found['step']} with another recipe: {told}; "
                "give the same, or --force to start over"
            )
        self.step, self.told, self.seconds = found["step"], found["told"], found["seconds"]

    def tensors(self) -> dict[str, Tensor]:
        """Return what was kept of the run that stopped; nothing where there was none.

        Raises:
            GossamerError: it cannot be read.
        """
        if not self.step:
            return {}
        file = self.folder / f"step-{self.step}.safetensors"
        try:
            found: dict[str, Tensor] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise GossamerError(f"{file} cannot be read, so the run cannot go on: {error}; --force starts over") from None
        return found

    def save(self, step: int, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """Keep the state after ``step``: tensors first, then the line that names them, each atomically."""
        try:
            with replacing(self.folder / f"step-{step}.safetensors") as temporary:
                save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise cannot_write(self.out, OSError(str(error))) from error
        told = {"recipe": self.recipe, "step": step, "told": self.told, "seconds": seconds}
        write_text(self.folder / "training.json", json.dumps(told))
        if self.step and self.step != step:
            (self.folder / f"step-{self.step}.safetensors").unlink(missing_ok=True)
        self.step, self.kept = step, time.perf_counter()
