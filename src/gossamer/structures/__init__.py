"""One file a method that removes structure; importing it here is what makes it known everywhere."""

from gossamer.structures.cfsp import CFSP
from gossamer.structures.depth import Depth

__all__ = ["CFSP", "Depth"]
