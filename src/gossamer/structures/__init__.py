"""One file a method that removes structure; importing it here is what makes it known everywhere."""

from gossamer.structures.adaptpruner import AdaptPruner
from gossamer.structures.cfsp import CFSP
from gossamer.structures.depth import Depth
from gossamer.structures.slicegpt import SliceGPT
from gossamer.structures.tyr import Tyr
from gossamer.structures.welore import WeLore
from gossamer.structures.ziplm import ZipLM

__all__ = ["CFSP", "AdaptPruner", "Depth", "SliceGPT", "Tyr", "WeLore", "ZipLM"]
