"""What the sweep is tested on: weights of some rows and columns, under a pattern, so many columns at a time."""

from typing import NamedTuple


class Sweep(NamedTuple):
    rows: int
    columns: int
    pattern: str
    sparsity: float | None = None
    block: int = 128


# Rows and columns that fill no program, blocks that do not divide, groups of one pair and as wide as a block.
TESTED = (
    Sweep(1, 1, "Unstructured", 0.0),
    Sweep(33, 70, "Unstructured", 0.5),
    Sweep(17, 130, "Unstructured", 0.9, block=32),
    Sweep(48, 200, "Unstructured(per='row')", 0.7),
    Sweep(40, 96, "2:4"),
    Sweep(5, 260, "1:2", block=7),
    Sweep(20, 77, "3:7"),
    Sweep(3, 256, "100:128"),
)
