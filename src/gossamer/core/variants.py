"""Variants: several of each of many matrices, on disk while one of each is in use."""

import errno
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError


class Variants:
    """Tensors by name and number, each in a file of a temporary directory, which goes with the context.

    >>> with Variants() as variants:
    ...     variants.put("a", 3, torch.tensor([[1.0, 2.0]]))
    ...     variants.get("a", 3)
    tensor([[1., 2.]])
    """

    def __init__(self) -> None:
        self._kinds: dict[Path, tuple[torch.Size, torch.dtype]] = {}

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="gossamer-")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._folder.cleanup()

    def put(self, name: str, number: int, tensor: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Keep a tensor, in that dtype; what stood under its name and number is gone.

        Raises:
            GossamerError: there is no room for it.
        """
        path = self._path(name, number)
        path.unlink(missing_ok=True)
        self._kinds.pop(path, None)
        try:
            file = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=dtype)
        except RuntimeError as error:
            told = f"no room for {tensor.numel() * dtype.itemsize:,} more bytes in {self._folder.name}: {error}"
            raise GossamerError(told) from OSError(errno.ENOSPC, str(error))
        file.copy_(tensor.reshape(-1))
        self._kinds[path] = tensor.shape, dtype

    def has(self, name: str, number: int) -> bool:
        """Whether a tensor is there."""
        return self._path(name, number) in self._kinds

    def get(self, name: str, number: int) -> Tensor:
        """Return a tensor, mapped from its file: it is read where it is used."""
        path = self._path(name, number)
        shape, dtype = self._kinds[path]
        return torch.from_file(str(path), shared=False, size=shape.numel(), dtype=dtype).view(shape)

    def _path(self, name: str, number: int) -> Path:
        return Path(self._folder.name) / f"{name}-{number}"
