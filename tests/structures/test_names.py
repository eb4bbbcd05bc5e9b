"""What every method of structure says of itself."""

from typing import Any

import pytest

from gossamer.core.spec import parse
from gossamer.sites.shrinking import STRUCTURES


@pytest.mark.parametrize("cls", STRUCTURES.values())
def test_it_reads_back_what_it_writes_and_says_what_it_removes(cls: Any) -> None:
    method = cls()
    assert parse(repr(method), STRUCTURES, "structure") == method
    assert hash(method) == hash(cls())
    assert method.removes
    assert method.removes <= {"blocks", "channels", "heads", "hidden", "ranks"}
    assert method.needs <= {"states", "norm", "mean", "gram", "grad", "divergence"}
