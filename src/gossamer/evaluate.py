"""How good a model still is: perplexity by one protocol, and lm-eval's tasks where that package is installed."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gossamer.core.errors import GossamerError
from gossamer.models import is_own

ROWS = 128  # logits are scored so many positions at a time: a float32 copy of a window's would double the memory


@torch.no_grad()  # not inference_mode: a tensor that a model caches in here must not forbid a later backward
def perplexity(
    model: torch.nn.Module,
    ids: Tensor,
    *,
    batch: int = 1,
    device: torch.device | str | None = None,
    progress: Callable[[Iterable[int], str, int], Iterable[int]] | None = None,
) -> dict[str, Any]:
    """Score windows, each with its own context: perplexity = exp(Σ −log p(token | tokens before it in its window) / scored).

    Args:
        model: a causal language model; left in the mode it was in.
        ids: windows of token ids, shape (n, seqlen), seqlen ≥ 2. The first token of each is context only.
        batch: windows a forward.
        device: where the model is moved; left where it is by default.
        progress: wraps the iteration over batches, as (iterable, description, total).

    Returns:
        perplexity, tokens (scored: n·(seqlen − 1)), seqlen, windows, seconds. A broken model's mean may not be finite: then
        perplexity is None, since JSON has no NaN, and ``note`` says how many windows were at fault.

    Raises:
        GossamerError: the model is no causal language model, or ids do not fit it.
    """
    _check(model, ids, batch)
    if device is not None:
        model.to(device)
    started = time.perf_counter()
    starts: Iterable[int] = range(0, len(ids), batch)
    if progress:
        starts = progress(starts, "perplexity", math.ceil(len(ids) / batch))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        nll = torch.cat([_nll(model, ids[start : start + batch]) for start in starts])
    finally:
        for module, mode in modes.items():
            module.training = mode
    scored = ids.numel() - len(ids)
    mean = float(nll.sum()) / scored
    finite = mean < math.log(torch.finfo(torch.float64).max)  # false for NaN too
    result: dict[str, Any] = {
        "perplexity": math.exp(mean) if finite else None,
        "tokens": scored,
        "seqlen": ids.shape[1],
        "windows": len(ids),
        "seconds": time.perf_counter() - started,
    }
    if not finite:
        broken = int((~nll.isfinite()).sum())
        result["note"] = f"no finite perplexity: the log-likelihood of {broken} of {len(ids)} windows is NaN or infinite"
    return result


def tasks(
    model: Path | torch.nn.Module,
    tasks: str,
    tasks_dir: Path | None = None,
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    batch: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """Hand a model over to lm-eval: {task: {metric: value}}.

    Args:
        model: a directory, or a model in memory, with its tokenizer.
        tasks: lm-eval's task names, separated by commas.
        tasks_dir: a folder with task files of one's own.
        limit: how many examples of each task; all by default.
        batch: answers scored at a time; by default 1 on a CPU, and 16 on a GPU, which one alone would leave idle.

    Raises:
        GossamerError: lm-eval is not installed, or knows no such task.
    """
    names, known = known_tasks(tasks, tasks_dir)
    from lm_eval import simple_evaluate

    inside = isinstance(model, torch.nn.Module)
    if device is None:  # lm-eval's own default is cuda, there or not
        device = next(model.parameters()).device if inside else "cuda" if torch.cuda.is_available() else "cpu"  # type: ignore[union-attr]
    if isinstance(model, Path) and is_own(model):
        import gossamer.hf  # noqa: F401 (importing it is what tells transformers how to load it)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "tokenizer": tokenizer} if inside else {"pretrained": str(model)},
        tasks=names,
        task_manager=known,
        limit=limit,
        batch_size=batch or (1 if torch.device(device).type == "cpu" else 16),
        device=str(device),
        log_samples=False,
    )
    return {task: _metrics(values) for task, values in found["results"].items()}


def known_tasks(tasks: str, tasks_dir: Path | None = None) -> tuple[list[str], Any]:
    """Return the names of tasks and lm-eval's manager that knows them.

    Raises:
        GossamerError: lm-eval is not installed, or knows no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise GossamerError("tasks need the package lm-eval: pip install lm-eval") from error

    if tasks_dir is not None and not tasks_dir.is_dir():
        raise GossamerError(f"no folder of task files {tasks_dir}")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    known = TaskManager(include_path=tasks_dir)
    unknown = [name for name in names if name not in known.all_tasks]
    if unknown or not names:
        told = ", ".join(map(repr, unknown)) or repr(tasks)
        raise GossamerError(
            f"lm-eval knows no task {told}: `lm-eval ls tasks` lists them; give the folder of task files of your own"
        )
    return names, known


def check_ids(model: torch.nn.Module, ids: Tensor) -> None:
    """Raise GossamerError if windows of token ids are longer than the model's context or go beyond its vocabulary."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(text, "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < ids.shape[-1]:
        raise GossamerError(f"windows of {ids.shape[-1]} tokens are longer than the {context} that {name} reads; lower seqlen")
    embeddings = getattr(model, "get_input_embeddings", None)
    if embeddings is not None:
        vocabulary, highest = embeddings().weight.shape[0], int(ids.max())
        if highest >= vocabulary:
            told = f"token id {highest}, but {name} has a vocabulary of {vocabulary}"
            raise GossamerError(f"the tokenizer does not fit the model: {told}")


def _check(model: torch.nn.Module, ids: Tensor, batch: int) -> None:
    """Refuse what has no perplexity, or would fail deep inside the model."""
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise GossamerError(f"ids are int64 windows of shape (n ≥ 1, seqlen ≥ 2), not {ids.dtype} of shape {tuple(ids.shape)}")
    if batch < 1:
        raise GossamerError(f"batch is a positive integer, not {batch!r}")
    name, config = type(model).__name__, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", lambda: True)():
        raise GossamerError(f"{name} is no causal language model: it has no perplexity")
    check_ids(model, ids)


def _nll(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the negative log-likelihood of each window, float64, shape (n,)."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    sums = torch.zeros(len(ids), dtype=torch.float64)
    for i, (rows, targets) in enumerate(zip(logits, ids[:, 1:], strict=True)):
        for part, wanted in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
            sums[i] += float(cross_entropy(part.float(), wanted.to(part.device), reduction="none").double().sum())
    return sums


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Keep the finite numbers among one task's "metric,filter" keys; "acc,none" (no filter) is called acc."""
    numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items() if math.isfinite(value)}
