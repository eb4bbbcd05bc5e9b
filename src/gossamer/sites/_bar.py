"""The progress bar of whatever takes long."""

from typing import Any

from tqdm import tqdm


def bar(total: int | None, what: str, progress: bool | None) -> Any:
    """Return a progress bar; shown when asked for, or, if ``progress`` is None, on a terminal."""
    return tqdm(total=total, desc=what, disable=None if progress is None else not progress, leave=False, dynamic_ncols=True)
