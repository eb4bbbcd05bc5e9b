"""Adapters of sparse weights, inside peft: after ``import gossamer.hf``, peft makes, trains, saves, loads and merges them.

Only this package imports peft.
"""

from peft import mapping

from gossamer.adapters._config import SparseConfig
from gossamer.adapters._tuner import SparseTuner
from gossamer.adapters.loraprune import LoRAPruneConfig
from gossamer.adapters.masklora import MaskLoRAConfig
from gossamer.adapters.pst import PSTConfig
from gossamer.adapters.scalelora import ScaleLoRAConfig
from gossamer.adapters.spp import SPPConfig

__all__ = ["LoRAPruneConfig", "MaskLoRAConfig", "PSTConfig", "SPPConfig", "ScaleLoRAConfig"]

CONFIGS: list[type[SparseConfig]] = [MaskLoRAConfig, ScaleLoRAConfig, LoRAPruneConfig, SPPConfig, PSTConfig]

# peft.utils.register_peft_method takes only members of its own enumeration PeftType, to which no other package can add. All it
# does is to fill these three dicts, whose keys are compared as strings: so they are filled here.
for config in CONFIGS:
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[config.method] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.method] = SparseTuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[config.method] = SparseTuner.prefix
