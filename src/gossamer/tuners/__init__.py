"""Published ways of training a sparse model, one file each."""

from gossamer.tuners.ast import AST
from gossamer.tuners.cast import CAST
from gossamer.tuners.full import Full
from gossamer.tuners.loraprune import LoRAPrune
from gossamer.tuners.maskllm import MaskLLM
from gossamer.tuners.masklora import MaskLoRA
from gossamer.tuners.oqp import OQP
from gossamer.tuners.perp import PERP
from gossamer.tuners.pst import PST
from gossamer.tuners.scalelora import ScaleLoRA
from gossamer.tuners.spp import SPP

__all__ = ["AST", "CAST", "OQP", "PERP", "PST", "SPP", "Full", "LoRAPrune", "MaskLLM", "MaskLoRA", "ScaleLoRA"]
