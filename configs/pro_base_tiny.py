"""A tiny twin of Pro-Base: pro_tiny.py stored as the base checkpoints are.

Reproduces: the code path of pro_base.py: FP8 experts, float32 scales.
Expected: 2.3 M parameters.
Hardware: one CPU core, seconds.
Command: v4jax inspect pro_base_tiny
"""

import dataclasses

from v4jax.config import ModelConfig
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    base = named_config("flash_base")
    return dataclasses.replace(
        named_config("pro_tiny"), expert_dtype=base.expert_dtype, quantization=base.quantization
    )
