"""Published ways of training a sparse model, one file each."""

from gossamer.tuners.ast import AST
from gossamer.tuners.cast import CAST
from gossamer.tuners.full import Full
from gossamer.tuners.maskllm import MaskLLM

__all__ = ["AST", "CAST", "Full", "MaskLLM"]
