"""Published ways of training a sparse model, one file each."""

from gossamer.tuners.full import Full

__all__ = ["Full"]
