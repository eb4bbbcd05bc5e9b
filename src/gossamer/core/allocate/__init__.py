"""Allocations: one sparsity turned into a sparsity for each tensor.

An allocation is a function of the tensors by name and of the sparsity of all of them together; hyper-parameters are keyword-
only, so that ``owl(outlier=7.0)`` is a spec. What it ``needs`` says what it is given:

    nothing     only shapes are read
    "weights"   the tensors are the weights themselves
    "scores"    the tensors are the method's scores of the dense model; "wanda": Wanda's
    "losses"    the tensors are the weights, and a third argument evaluates the loss on each calibration window
    "trials"    the tensors are the weights, and a third argument prunes them all to some sparsities and measures choices
    "errors"    a third argument measures what the method does to each tensor's output at a grid of sparsities

The sparsities it returns keep (1 − S)·Σ n entries in all, to within one entry for each tensor.
"""

from gossamer.core.allocate._declared import Allocation as Allocation  # as: for others to use, but no name of a spec
from gossamer.core.allocate._declared import needs as needs
from gossamer.core.allocate._declared import sets_total as sets_total
from gossamer.core.allocate._evolved import evolved
from gossamer.core.allocate._index import sap
from gossamer.core.allocate._probed import ecoflap
from gossamer.core.allocate._ranked import by, global_, owl
from gossamer.core.allocate._searched import in_steps as in_steps
from gossamer.core.allocate._searched import searched
from gossamer.core.allocate._shapes import erk, mapping, uniform

__all__ = [  # the allocations by name: what a spec may say
    "by",
    "ecoflap",
    "erk",
    "evolved",
    "global_",
    "mapping",
    "owl",
    "sap",
    "searched",
    "uniform",
]
