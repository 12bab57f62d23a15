"""DeepSeek-V4-Pro-Base: Pro before post-training, with its experts in FP8.

Reproduces: the base checkpoint, whose routed experts are FP8 and whose scales are all float32.
Expected: the model of pro.py, and nearly twice its bytes.
Hardware: its weights fill 1.6 TB; `v4jax inspect` needs a laptop and a second.
Command: v4jax inspect pro_base
"""

import dataclasses

from v4jax.config import ModelConfig
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    base = named_config("flash_base")
    return dataclasses.replace(
        named_config("pro"), expert_dtype=base.expert_dtype, quantization=base.quantization
    )
