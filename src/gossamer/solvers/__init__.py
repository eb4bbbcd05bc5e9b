"""One file a method that also moves the kept weights; importing it here is what makes it known everywhere."""

from gossamer.solvers.alps import ALPS
from gossamer.solvers.armor import ARMOR
from gossamer.solvers.asymmetric import Asymmetric
from gossamer.solvers.dsnot import DSnoT
from gossamer.solvers.gqsa import GQSA
from gossamer.solvers.mask import Mask
from gossamer.solvers.nettrim import NetTrim
from gossamer.solvers.obert import OBERT
from gossamer.solvers.parallel import Parallel
from gossamer.solvers.sparsegpt import SparseGPT
from gossamer.solvers.sparsellm import SparseLLM

__all__ = ["ALPS", "ARMOR", "GQSA", "OBERT", "Asymmetric", "DSnoT", "Mask", "NetTrim", "Parallel", "SparseGPT", "SparseLLM"]
