"""Damage packed checkpoints, and count what becomes of them: an error that says so, or weights that pass every check.

    python benchmarks/fuzz_packed.py --count 10000

Most are only checked; every ``--whole``-th is loaded as a model too, whose weights and logits must be those of its own dense
unpacking. Anything else, another exception among it, is a failure: it is counted, shown, and the exit status is 1.
"""

import argparse
import collections
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialise

import gossamer
from gossamer import formats
from gossamer.core.pattern import NM, Block
from gossamer.models import quiet
from gossamer.sites._packed import checksum, opened
from gossamer.sites._packed_write import sparse_layers
from gossamer.sites._sparse_linear import SparseLinear

Files = dict[str, bytes]  # a directory's files by name
JUNK: list[Any] = [None, True, -1, 0, 7, 2**31, 2**64, 1.5, "", "x", [], [1], {}, {"x": 1}, "NM", "Bitmask", "float64"]


def specimen(folder: Path) -> Files:
    """Save a tiny model whose weights are packed in every format, in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, initializer_range=0.5)).eval().bfloat16()
    gossamer.prune(model, "Magnitude", "2:4", targets="*.up_proj,*.gate_proj")
    gossamer.prune(model, "Magnitude", "4x2", sparsity=0.5, targets="*.down_proj")
    gossamer.prune(model, "GQSA", "1x8", sparsity=0.5, targets="*.o_proj", data=torch.arange(32).view(2, 16))
    gossamer.prune(model, "Magnitude", "Unstructured", sparsity=0.6, targets="*.[qkv]_proj")
    for name, module in list(model.named_modules()):
        tail = name.rpartition(".")[2]
        if tail in ("up_proj", "gate_proj"):
            model.set_submodule(name, SparseLinear(formats.NM.pack(module.weight, pattern=NM(2, 4))))
        elif tail == "down_proj":
            model.set_submodule(name, SparseLinear(formats.Block.pack(module.weight, pattern=Block(4, 2))))
        elif tail == "o_proj":
            model.set_submodule(name, SparseLinear(formats.Grouped.pack(module.weight, pattern=Block(1, 8))))
        elif tail.endswith("_proj"):
            model.set_submodule(name, SparseLinear(formats.Bitmask.pack(module.weight)))
    gossamer.save(model, folder / "whole", packed=True)
    loaded = gossamer.load(folder / "whole")
    with quiet():
        loaded.save_pretrained(folder / "shards", max_shard_size="6KB")
    return {file.name: file.read_bytes() for file in sorted((folder / "shards").iterdir())}


def shards(files: Files) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def bit_flipped(files: Files, random: random.Random) -> None:
    """One bit, anywhere in a shard's data."""
    name = random.choice(shards(files))
    data = bytearray(files[name])
    header = 8 + int.from_bytes(data[:8], "little")
    data[random.randrange(header, len(data))] ^= 1 << random.randrange(8)
    files[name] = bytes(data)


def header_byte(files: Files, random: random.Random) -> None:
    """One byte of a shard's header, its length among it."""
    name = random.choice(shards(files))
    data = bytearray(files[name])
    data[random.randrange(8 + int.from_bytes(data[:8], "little"))] = random.randrange(256)
    files[name] = bytes(data)


def header_number(files: Files, random: random.Random) -> None:
    """One number or dtype of a shard's header, the header being well-formed."""
    name = random.choice(shards(files))
    size = int.from_bytes(files[name][:8], "little")
    header = json.loads(files[name][8 : 8 + size])
    tensor = header[random.choice([key for key in header if key != "__metadata__"])]
    what = random.choice(["dtype", "shape", "data_offsets"])
    if what == "dtype":
        tensor[what] = random.choice(["U8", "I8", "BF16", "F16", "F32", "I64", "BOOL", "F64", "X"])
    elif tensor[what]:
        tensor[what][random.randrange(len(tensor[what]))] += random.choice([-8, -1, 1, 8, 2**40, 2**63])
    text = json.dumps(header).encode()
    files[name] = len(text).to_bytes(8, "little") + text + files[name][8 + size :]


def length(files: Files, random: random.Random) -> None:
    """A shard cut short, or longer than it says."""
    name = random.choice(shards(files))
    data = files[name]
    files[name] = data[: random.randrange(len(data))] if random.random() < 0.7 else data + b"\0" * random.randrange(1, 64)


def tensors(files: Files, random: random.Random) -> None:
    """A tensor lost, twice there, renamed, swapped with another, of another length, dtype or content."""
    name = random.choice(shards(files))
    held = parse(files[name])
    one, two = random.choice(list(held)), random.choice(list(held))
    kind = random.randrange(8)
    if kind == 0:
        del held[one]
    elif kind == 1:
        held[f"{one}x"] = held[one].clone()
    elif kind == 2:
        held[f"{one.rpartition('.')[0]}.{random.choice(['values', 'bits', 'weight', 'offsets', 'columns'])}"] = held.pop(one)
    elif kind == 3:
        held[one], held[two] = held[two].clone(), held[one].clone()
    elif kind == 4:
        held[one] = held[one].flatten()[: random.randrange(held[one].numel() + 1)].clone()
    elif kind == 5:
        held[one] = held[one].flatten().view(torch.uint8).clone()
    elif kind == 6:
        held[one] = torch.randint(0, 256, (held[one].nbytes,), dtype=torch.uint8).view(held[one].dtype).view(held[one].shape)
    else:
        other = random.choice(shards(files))
        if other != name:
            held = parse(files[other])
    files[name] = serialise(held, metadata={"format": "pt"})


def entry(files: Files, random: random.Random) -> None:
    """One value, somewhere in the config's entry, is another, or gone."""
    config = json.loads(files["config.json"])
    at: Any = config["quantization_config"]
    while True:
        key = random.choice(list(at)) if isinstance(at, dict) else random.randrange(len(at))
        if not isinstance(at[key], dict | list) or not at[key] or random.random() < 0.2:
            break
        at = at[key]
    kind = random.random()
    if kind < 0.2:
        del at[key]
    elif kind < 0.5 and type(at[key]) is int:
        at[key] += random.choice([-1, 1, 4, 8])
    elif kind < 0.6 and isinstance(at, dict):
        at[f"{key}x"] = at.pop(key)
    else:
        at[key] = random.choice(JUNK)
    files["config.json"] = json.dumps(config).encode()


def json_byte(files: Files, random: random.Random) -> None:
    """One byte of config.json or of the index."""
    name = random.choice(["config.json", "model.safetensors.index.json"])
    data = bytearray(files[name])
    data[random.randrange(len(data))] = random.randrange(256)
    files[name] = bytes(data)


def lost(files: Files, random: random.Random) -> None:
    """A shard or the index lost, or two shards swapped."""
    one, two = random.choice([*shards(files), "model.safetensors.index.json"]), random.choice(shards(files))
    if random.random() < 0.5:
        del files[one]
    else:
        files[one], files[two] = files[two], files[one]


def with_checksums(damage: Callable[[Files, random.Random], None]) -> Callable[[Files, random.Random], None]:
    """Damage, and write the checksums of what is there now: only the checks of the layout are left to see it."""

    def forged(files: Files, random: random.Random) -> None:
        damage(files, random)
        try:
            config = json.loads(files["config.json"])
            held = [item for name in shards(files) for item in parse(files[name]).items()]
            config["quantization_config"]["crc32"] = {name: checksum(tensor) for name, tensor in held}
        except Exception:  # too broken for that
            return
        files["config.json"] = json.dumps(config).encode()

    forged.__name__ = f"{damage.__name__}, new checksums"
    return forged


DAMAGES = [bit_flipped, header_byte, header_number, length, tensors, entry, json_byte, lost]
DAMAGES += [with_checksums(damage) for damage in (bit_flipped, header_number, tensors, tensors, entry)]


def written(files: Files, folder: Path) -> Path:
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def checked(path: Path) -> str:
    """Open a directory and read every packed weight of it; what is accepted must also run, within its bounds."""
    try:
        packed, files = opened(path)
        weights = [weight.read(files.of(name, weight)) for name, weight in packed.weights.items()]
    except gossamer.GossamerError:
        return "refused"
    for weight in weights:
        x = torch.ones(1, weight.shape[1], dtype=weight.values.dtype)
        assert weight.linear(x).shape == (1, weight.shape[0])
        assert weight.dense().shape == weight.shape
    return "sound"


def loaded(path: Path, folder: Path) -> str:
    """Load a directory, and compare with its own dense unpacking."""
    try:
        model = gossamer.load(path)
    except gossamer.GossamerError:
        return "refused"
    gossamer.unpack_checkpoint(path, folder, force=True)
    dense = gossamer.load(folder)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), dense(ids).logits.float()
    finite = theirs.isfinite()  # dense products make 0 · inf of what sparse ones leave out
    assert torch.allclose(
        ours[finite], theirs[finite], rtol=0.1, atol=0.1 * float(theirs[finite].abs().max()) if finite.any() else 0
    )
    for name, layer in sparse_layers(model).items():
        assert torch.equal(_bits(layer.packed.dense()), _bits(dense.get_submodule(name).weight)), name
    return "loaded"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def fuzz(count: int, seed: int, whole: int, folder: Path) -> tuple[collections.Counter[tuple[str, str]], list[str]]:
    """Return how often each damage had each outcome, and what failed."""
    found = specimen(folder)
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    failures = []
    (folder / "case").mkdir()
    for number in range(count):
        chance = random.Random(seed * 1_000_003 + number)
        files, damage = dict(found), DAMAGES[number % len(DAMAGES)]
        damage(files, chance)
        path = written(files, folder / "case")
        try:
            outcome = checked(path)
            if number // len(DAMAGES) % whole == 0:
                outcome = f"{outcome}, {loaded(path, folder / 'dense')}"
        except BaseException as error:  # a panic of safetensors would be none of Exception's
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "FAILED"
            failures.append(f"case {number} ({damage.__name__}): {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        outcomes[damage.__name__, outcome] += 1
    return outcomes, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", type=int, default=20, help="load every so-many-th of each damage as a model")
    asked = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failures = fuzz(asked.count, asked.seed, asked.whole, Path(folder))
    for (damage, outcome), times in sorted(outcomes.items()):
        print(f"{times:6}  {damage}: {outcome}")
    for line in failures[:20]:
        print(line)
    print(f"{asked.count} damaged checkpoints, {len(failures)} failures, {time.perf_counter() - started:.0f} s")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
