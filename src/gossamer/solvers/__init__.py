"""One file a method that also moves the kept weights; importing it here is what makes it known everywhere."""

from gossamer.solvers.mask import Mask
from gossamer.solvers.sparsegpt import SparseGPT

__all__ = ["Mask", "SparseGPT"]
