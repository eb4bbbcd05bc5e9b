"""One file a stored layout; importing it here is what makes it known everywhere."""

from gossamer.formats.bitmask import Bitmask
from gossamer.formats.block import Block
from gossamer.formats.grouped import Grouped
from gossamer.formats.nm import NM
from gossamer.formats.sliced import Sliced
from gossamer.formats.tiled import Tiled
from gossamer.formats.wrapped import Wrapped

__all__ = ["NM", "Bitmask", "Block", "Grouped", "Sliced", "Tiled", "Wrapped"]
