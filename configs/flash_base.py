"""DeepSeek-V4-Flash-Base: Flash before post-training, with its experts in FP8.

Reproduces: the base checkpoint, whose routed experts are FP8 and whose scales are all float32.
Expected: the model of flash.py, and nearly twice its bytes.
Hardware: its weights fill 290 GB; `v4jax inspect` needs a laptop and a second.
Command: v4jax inspect flash_base
"""

import dataclasses

from v4jax.config import ModelConfig
from v4jax.hf.tensors import fp8_quantization
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    return dataclasses.replace(
        named_config("flash"), expert_dtype=None, quantization=fp8_quantization("float32")
    )
