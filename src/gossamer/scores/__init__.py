"""One file a published score; importing it here is what makes it known everywhere."""

from gossamer.scores.gradient import Gradient
from gossamer.scores.magnitude import Magnitude
from gossamer.scores.nowagp import NoWagP
from gossamer.scores.random import Random
from gossamer.scores.ria import RIA
from gossamer.scores.wanda import Wanda

__all__ = ["RIA", "Gradient", "Magnitude", "NoWagP", "Random", "Wanda"]
