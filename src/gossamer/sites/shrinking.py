"""The structure site: remove whole channels, heads or blocks of a transformers model, in place."""

import copy
import shlex
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import structures
from gossamer.core.errors import GossamerError
from gossamer.core.report import Report
from gossamer.core.spec import names_in, parse
from gossamer.core.stats import INPUTS, Stats
from gossamer.core.structure import Group, Skeleton, Solve, Step, Structure
from gossamer.models import causal_lm, check_directory, tokenizer
from gossamer.sites._calibrate import Batch, Calibration, Call
from gossamer.sites._coupling import Coupling, couplings, is_transposed
from gossamer.sites._hidden import Hidden
from gossamer.sites._inputs import batches_of, check_batches
from gossamer.sites._job import check_finite
from gossamer.sites._rows import describe, peak_bytes
from gossamer.sites._walk import Target, blocks_of, targets
from gossamer.sites._widths import KINDS, built, difference, narrower, renumber, settle, widths_of
from gossamer.sites.checkpoint import check_out, save
from gossamer.sites.weights import LANES, bar

STRUCTURES = names_in(structures)


def shrink(
    model: nn.Module,
    method: str | Structure,
    *,
    sparsity: float,
    data: str | Path | Tensor | Sequence[Batch] | None = None,
    tokenizer: Any = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    device: str | torch.device | None = None,
    lanes: int = LANES,
    progress: bool | None = None,
) -> Report:
    """Remove structure from a transformers model in place: what is left is a smaller dense one.

    Args:
        model: a transformers model; tied weights stay tied, dtypes and devices stay as they are.
        method: a method of structure, or its spec: "Depth", "CFSP(multiple=128)".
        sparsity: the fraction of the parameters inside the blocks that goes, in (0, 1).
        data: calibration text (a file, a directory, "builtin", a data set's name), token ids of shape (samples, seqlen), or
            a sequence of keyword-argument mappings for the model.
        tokenizer: for text; by default the one saved with the model.
        seqlen, samples, sample, seed: how windows are cut and drawn from text (see `gossamer.data`).
        device: where blocks are worked on, one at a time; by default where the model is.
        lanes: groups of windows that go through a block in lockstep; more use less memory.
        progress: show a bar; by default only on a terminal.

    Returns:
        The `Report`; its ``structure`` counts parameters and blocks before and after, and says what opens the result.

    Raises:
        GossamerError: anything asked for that cannot be; the model is unchanged.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=64)
    >>> report = shrink(LlamaForCausalLM(tiny), "Depth", sparsity=0.25, data=torch.randint(64, (4, 16)))
    >>> report.structure["blocks"], report.structure["plain"]
    ([4, 3], True)
    """
    started = time.perf_counter()
    how = structure_of(method)
    check_sparsity(sparsity)
    blocks = blocks_of(model)[1]
    for target in targets(model):
        if target.parameter.is_meta:
            raise GossamerError(f"{target.name} is offloaded: load the model whole to shrink it")
        check_finite(target)
    kinds = [kind for kind in KINDS if kind in how.removes]
    found = {kind: couplings(model, blocks, kind) for kind in kinds}
    batches: list[Batch] = []
    if how.needs:
        if data is None:
            raise GossamerError(f"{how} needs calibration data: give data= a text file, token ids, or 'builtin'")
        split = lambda ids: ids.tensor_split(min(lanes, len(ids)))  # noqa: E731
        folder, place = getattr(model, "name_or_path", ""), next(model.parameters()).device
        batches = batches_of(data, tokenizer, seqlen, samples, sample, seed, split, folder=folder, device=place)
        check_batches(model, batches)
    training = model.training
    model.eval()  # dropout would blur the statistics
    before = _count(model)
    skeleton = _Skeleton(model, how, batches, None if device is None else torch.device(device), progress)
    try:
        if batches:
            _try_out(skeleton, [by_block[0] for by_block in found.values()])
        try:
            how(skeleton, sparsity)
        except ArithmeticError as error:
            raise GossamerError(str(error)) from error
        plain = settle(model)
    finally:
        model.train(training)
    after = _count(model)
    structure = {
        **{what: [before[what], after[what]] for what in before},
        "sparsity": 1 - after["inside"] / before["inside"],
        "plain": plain,
        "widths": dict(widths_of(model)),
    }
    drawn = _drawn(data, batches, seqlen, samples, sample, seed)
    return Report(
        kind="shrink",
        recipe={"method": repr(how), "pattern": None, "sparsity": sparsity, **drawn},
        model=describe(model),
        weights=[],
        blocks=skeleton.rows,
        structure=structure,
        seconds={"total": time.perf_counter() - started},
        peak_bytes=peak_bytes(),
    )


def shrink_checkpoint(
    source: str | Path,
    out: str | Path,
    method: str | Structure,
    *,
    sparsity: float,
    data: str | Path | None = None,
    seqlen: int = 512,
    samples: int = 32,
    sample: str = "random",
    seed: int = 0,
    device: str | None = None,
    progress: bool | None = None,
    force: bool = False,
    name: str | None = None,
) -> Report:
    """Shrink the model in ``source`` into a new directory ``out``, which appears whole or not at all; all of it is in memory.

    Args:
        source: a directory with config.json, safetensors and a tokenizer.
        out: where the result goes; it must be empty or absent unless ``force``.
        name: what the report calls the model.
        others: as in `gossamer.shrink`.

    Raises:
        GossamerError: anything asked for that cannot be; ``out`` is as it was.
    """
    source = Path(source)
    check_directory(source)
    check_out(Path(out), source, force)
    model, tokens = causal_lm(source), tokenizer(source)
    drawn: dict[str, Any] = {"data": data, "seqlen": seqlen, "samples": samples, "sample": sample, "seed": seed}
    report = shrink(model, method, sparsity=sparsity, tokenizer=tokens, device=device, progress=progress, **drawn)
    report.model["name"] = name or str(source)
    report.recipe["command"] = command_of(report.model["name"], report.recipe, str(out))
    save(model, out, report=report, tokenizer=tokens, force=force)
    return report


def structure_of(method: str | Structure) -> Structure:
    """Read a method's spec.

    Raises:
        GossamerError: there is no such method of structure.
    """
    found = parse(method, STRUCTURES, "structure") if isinstance(method, str) else method
    if not isinstance(found, Structure):
        raise GossamerError(f"{method!r} is no method of structure, such as {' or '.join(sorted(STRUCTURES))}")
    return found


def check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise GossamerError(f"sparsity is the fraction of the blocks' parameters that goes, in (0, 1); got {sparsity}")


def opens(plain: bool, folder: str | Path = "DIR") -> str:
    """Say what loads a shrunk model."""
    if plain:
        return f"plain transformers opens it: from_pretrained({str(folder)!r})"
    return (
        f"gossamer.load({str(folder)!r}) opens it, or from_pretrained after `import gossamer.hf`: "
        "its blocks differ in width, which transformers has no word for"
    )


def command_of(model: str, recipe: dict[str, Any], out: str) -> str:
    """Return the shell command that shrinks a model by this recipe."""
    words = ["gossamer", "shrink", model, "--method", recipe["method"], "--sparsity", str(recipe["sparsity"])]
    for option in ("data", "seqlen", "samples", "sample", "seed"):
        words += [f"--{option}", str(recipe[option])] if option in recipe else []
    return shlex.join([*words, "--out", out])


class _Skeleton(Skeleton):
    """A model as a method sees it."""

    def __init__(
        self, model: Any, how: Structure, batches: Sequence[Batch], device: torch.device | None, progress: bool | None
    ) -> None:
        self.model, self.how, self.batches, self.device, self.progress = model, how, batches, device, progress
        self.list = blocks_of(model)[1]
        self.rows: list[dict[str, Any]] = [{"block": index} for index in range(len(self.list))]

    @property
    def blocks(self) -> int:
        return len(self.list)

    @property
    def parameters(self) -> int:
        return _count(self.model)["inside"]

    def groups(self, kind: str) -> list[Group]:
        return [coupling.group() for coupling in couplings(self.model, self.list, kind)]

    def walk(self, *kinds: str, solve: Solve | None = None) -> Iterator[Step]:
        walk = Calibration(self.model, self.batches, self.how.needs & INPUTS, device=self.device)
        found = {kind: couplings(self.model, self.list, kind) for kind in kinds}
        inputs = [_states(call) for call in walk.calls(0, walk.blocks[0], answered=False)]
        with bar(self.blocks, str(self.how), self.progress) as shown:
            for index in range(self.blocks):
                here = [by_block[index] for by_block in found.values()]
                by_module = {coupling.out: coupling for coupling in here}
                stats: dict[str, Stats] = {}

                def visit(target: Target, known: list[Stats], by_module: Any = by_module, stats: Any = stats) -> None:
                    coupling = by_module[target.module]
                    stats[coupling.kind] = known[0]
                    if solve is not None:
                        solve(coupling.group(), known[0])

                walk.block(index, [_target(coupling) for coupling in here], visit)
                outputs = [out[0] if isinstance(out, tuple) else out for out in walk.outputs]
                yield Step(index, inputs, outputs, stats)
                inputs = outputs
                shown.update()

    def keep(self, group: Group, members: Tensor) -> None:
        row = self.rows[group.block]
        row[group.kind] = [group.count, len(members)]
        if len(members) < group.count:
            couplings(self.model, self.list, group.kind)[group.block].keep(members)

    def drop(self, blocks: Sequence[int]) -> None:
        left = [index for index in range(self.blocks) if index not in set(blocks)]
        config = _shorter(self.model.config, self.blocks, left)
        widths = {kind: [sizes[i] for i in left] for kind, sizes in widths_of(self.model).items()}
        if told := difference(built(type(self.model), config, widths), self.model, left):
            name = type(self.model).__name__
            raise GossamerError(f"{name} without blocks {list(blocks)} is no model that can be built: {told}")
        for index in sorted(blocks, reverse=True):
            self.rows[index]["dropped"] = True
            del self.list[index]
        self.model.config.__dict__.update({k: v for k, v in config.__dict__.items() if k != "quantization_config"})
        renumber(self.model)

    @cached_property
    def _hidden(self) -> Hidden:
        return Hidden.of(self.model, self.batches[0])

    @property
    def width(self) -> int:
        return self._hidden.width

    def project(self, q: Tensor) -> None:
        config = narrower(self.model, q.shape[1])
        self._hidden.project(self.model, q)
        self.model.config.__dict__.update({k: v for k, v in config.__dict__.items() if k != "quantization_config"})

    def note(self, block: int, **values: Any) -> None:
        self.rows[block].update(values)


def _shorter(config: Any, depth: int, left: Sequence[int]) -> Any:
    """Return a configuration of these blocks only; its lists of one value a block are cut along."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if "layer" in name and isinstance(value, list | tuple) and value:
            if len(value) != depth:
                raise GossamerError(f"config.{name} = {value} names blocks in a way that cannot be cut")
            setattr(text, name, type(value)(value[i] for i in left))
    text.num_hidden_layers = len(left)
    return config


@torch.no_grad()
def _try_out(skeleton: _Skeleton, found: Sequence[Coupling]) -> None:
    """Remove a member of the first block in a copy, and compare with one whose columns are zero: the table is right for it."""
    walk = Calibration(skeleton.model, skeleton.batches[:1], frozenset(), device=skeleton.device)
    block = walk.blocks[0]
    call: Call = walk.calls(0, block, answered=False)[0]

    def answer(coupling: Coupling, gone: int, cut: bool) -> Tensor:
        """Return what the block puts out with the columns of its first members zero, and the first one cut or not."""
        twin = copy.deepcopy(block)
        (own,) = couplings(skeleton.model, [twin], coupling.kind)
        own.group().out[:, : gone * own.group().width] = 0
        if cut:
            own.keep(torch.arange(1, own.count))
        out = twin(*call.args, **call.kwargs)
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states.double()

    for coupling in found:
        if coupling.count < 2:  # as another run has left it
            continue
        whole, nothing = answer(coupling, 1, False), answer(coupling, coupling.count, False)
        try:
            off = float((answer(coupling, 1, True) - whole).abs().max())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise GossamerError(_untrue(skeleton.model, coupling, " ".join(str(error).split())[:160])) from error
        moved = float((whole - nothing).abs().max())  # what the members do at all
        if not off <= 16 * torch.finfo(coupling.out.weight.dtype).eps * (moved + float(whole.abs().max())):
            raise GossamerError(_untrue(skeleton.model, coupling, f"its outputs are off by {off:.3g}, of {moved:.3g}"))


def _untrue(model: nn.Module, coupling: Coupling, told: str) -> str:
    return f"{type(model).__name__} does not work with fewer {coupling.kind} than its configuration says: {told}"


def _target(coupling: Coupling) -> Target:
    return Target(coupling.kind, coupling.out, "weight", coupling.block, transposed=is_transposed(coupling.out))


def _states(call: Call) -> Tensor:
    states: Tensor = (*call.args, call.kwargs.get("hidden_states"))[0]
    return states


def _count(model: nn.Module) -> dict[str, int]:
    """Count parameters (tied ones once), those in the blocks, and blocks."""
    blocks = blocks_of(model)[1]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "inside": sum(p.numel() for p in blocks.parameters()),
        "blocks": len(blocks),
    }


def _drawn(data: Any, batches: Sequence[Batch], seqlen: int, samples: int, sample: str, seed: int) -> dict[str, Any]:
    """Return what a recipe says of the calibration windows."""
    if not batches:
        return {}
    if isinstance(data, str | Path):
        return {"data": str(data), "seqlen": seqlen, "samples": samples, "sample": sample, "seed": seed}
    return {"data": "given", "samples": sum(len(next(iter(batch.values()))) for batch in batches)}
