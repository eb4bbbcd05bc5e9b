"""What a product is tested and timed on, as plain data; cases.py of each product says which."""

from typing import NamedTuple

BATCHES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 24, 25, 40, 64, 70)
TIMED_BATCHES = (1, 4, 16, 64, 512)


class Case(NamedTuple):
    """A weight: its size, what its zeros follow, and the fraction of them (None where the pattern says it)."""

    rows: int
    columns: int
    pattern: str = "Unstructured"
    sparsity: float | None = 0.5
