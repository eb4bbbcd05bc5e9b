"""Damaged packed checkpoints are refused, or are the model that they unpack to: never a crash, nor another exception."""

import random
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.sites._packed_write import sparse_layers

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fuzz_packed.py"))


def test_every_damage_ends_in_an_error_or_the_same_model(tmp_path: Path) -> None:
    outcomes, failures = FUZZ["fuzz"](count=260, seed=2, whole=10, folder=tmp_path)
    assert not failures
    ends: dict[str, Counter[str]] = {}
    for (damage, outcome), times in outcomes.items():
        ends.setdefault(damage, Counter())[outcome.split(",")[0]] += times
    assert len(ends) == len({damage.__name__ for damage in FUZZ["DAMAGES"]})
    assert set(ends["bit_flipped"]) == {"refused"}  # whichever bit it was
    assert set(ends["length"]) == {"refused"}
    assert ends["bit_flipped, new checksums"]["sound"]  # another value is a weight too
    assert ends["bit_flipped, new checksums"]["refused"]  # another mask is not


@pytest.mark.filterwarnings("ignore")  # what plain transformers says of a damaged config is its own
def test_plain_transformers_raises_or_loads_what_passes_every_check(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = FUZZ["specimen"](tmp_path)
    whole = tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "shards"))
    (tmp_path / "case").mkdir()
    ends: Counter[str] = Counter()
    for number in range(50):
        files = dict(found)
        damage = FUZZ["DAMAGES"][number % 5]  # the tensors, and not what the config makes of them
        damage(files, random.Random(number))
        try:
            model = AutoModelForCausalLM.from_pretrained(FUZZ["written"](files, tmp_path / "case"))
        except Exception:
            ends["refused"] += 1
            continue
        ends["loaded"] += 1
        held = tensors(model)
        assert held.keys() == whole.keys()
        assert all(torch.equal(held[name], whole[name]) for name in whole), damage.__name__
    assert ends["refused"] > 40


def tensors(model: Any) -> dict[str, torch.Tensor]:
    packed = {name: layer.packed.dense() for name, layer in sparse_layers(model).items()}
    return {**model.state_dict(), **packed}


def test_nothing_else_is_accepted(tmp_path: Path) -> None:
    FUZZ["specimen"](tmp_path)
    assert FUZZ["checked"](tmp_path / "shards") == "sound"
    assert FUZZ["loaded"](tmp_path / "shards", tmp_path / "dense") == "loaded"
    with pytest.raises(gossamer.GossamerError, match="is not packed"):
        gossamer.unpack_checkpoint(tmp_path / "dense", tmp_path / "out")
