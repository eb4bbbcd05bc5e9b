"""One file a published score; importing it here is what makes it known everywhere."""

from gossamer.scores.fisher import Fisher
from gossamer.scores.gradient import Gradient
from gossamer.scores.grasp import GraSP
from gossamer.scores.magnitude import Magnitude
from gossamer.scores.nowagp import NoWagP
from gossamer.scores.random import Random
from gossamer.scores.ria import RIA
from gossamer.scores.sampled import Sampled
from gossamer.scores.synflow import SynFlow
from gossamer.scores.wanda import Wanda

__all__ = ["RIA", "Fisher", "GraSP", "Gradient", "Magnitude", "NoWagP", "Random", "Sampled", "SynFlow", "Wanda"]
