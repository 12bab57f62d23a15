"""A tiny twin of Flash-Base: flash_tiny.py stored as the base checkpoints are.

Reproduces: the code path of flash_base.py: FP8 experts, float32 scales.
Expected: 1.1 M parameters.
Hardware: one CPU core, seconds.
Command: v4jax inspect flash_base_tiny
"""

import dataclasses

from v4jax.config import ModelConfig
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    base = named_config("flash_base")
    return dataclasses.replace(
        named_config("flash_tiny"), expert_dtype=base.expert_dtype, quantization=base.quantization
    )
