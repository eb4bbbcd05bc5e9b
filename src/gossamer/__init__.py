"""Gossamer makes neural networks sparse and makes the sparsity pay."""

from gossamer.core.errors import GossamerError
from gossamer.core.pattern import NM, Block, Channel, Pattern, Threshold, TopK, Unstructured
from gossamer.core.report import Report
from gossamer.core.schedule import Constant, Cosine, Cubic, Linear
from gossamer.core.score import Score
from gossamer.core.solver import Factorizer, Solver
from gossamer.core.stats import Stats
from gossamer.core.structure import Structure
from gossamer.core.tuner import Tuner, Tuning
from gossamer.forecast import plan
from gossamer.merging import merge
from gossamer.models import load
from gossamer.recovering import recover
from gossamer.scores import RIA, Gradient, GraSP, Magnitude, NoWagP, Random, Sampled, SynFlow, Wanda
from gossamer.sites.checkpoint import prune_checkpoint, save, unpack_checkpoint
from gossamer.sites.distilling import distill
from gossamer.sites.holding import hold
from gossamer.sites.packing import pack, unpack
from gossamer.sites.reconstructing import Reconstruct, reconstruct
from gossamer.sites.shrinking import shrink
from gossamer.sites.weights import prune
from gossamer.solvers import ALPS, ARMOR, GQSA, OBERT, Asymmetric, DSnoT, Mask, NetTrim, Parallel, SparseGPT
from gossamer.speed import bench
from gossamer.structures import CFSP, Depth, SliceGPT, ZipLM
from gossamer.tuners import AST, CAST, OQP, PERP, PST, SPP, Full, LoRAPrune, MaskLLM, MaskLoRA, ScaleLoRA
from gossamer.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "ALPS",
    "ARMOR",
    "AST",
    "CAST",
    "CFSP",
    "GQSA",
    "NM",
    "OBERT",
    "OQP",
    "PERP",
    "PST",
    "RIA",
    "SPP",
    "Asymmetric",
    "Block",
    "Channel",
    "Constant",
    "Cosine",
    "Cubic",
    "DSnoT",
    "Depth",
    "Factorizer",
    "Full",
    "GossamerError",
    "GraSP",
    "Gradient",
    "Linear",
    "LoRAPrune",
    "Magnitude",
    "Mask",
    "MaskLLM",
    "MaskLoRA",
    "NetTrim",
    "NoWagP",
    "Parallel",
    "Pattern",
    "Random",
    "Reconstruct",
    "Report",
    "Sampled",
    "ScaleLoRA",
    "Score",
    "SliceGPT",
    "Solver",
    "SparseGPT",
    "Stats",
    "Structure",
    "SynFlow",
    "Threshold",
    "TopK",
    "Tuner",
    "Tuning",
    "Unstructured",
    "Wanda",
    "ZipLM",
    "bench",
    "distill",
    "hold",
    "load",
    "merge",
    "pack",
    "plan",
    "prune",
    "prune_checkpoint",
    "reconstruct",
    "recover",
    "save",
    "shrink",
    "tune",
    "unpack",
    "unpack_checkpoint",
]
