"""DeepSeek-V4-Flash, the instruct release: 284.33 B parameters, 13.27 B active.

Reproduces: the config.json of the official checkpoint (FP8 weights, routed experts in FP4).
Expected: 69,187 tensors of 159,609,485,896 bytes; 3514.3 KV bytes a token; 121 G FLOPs a decoded
    token at a context of 2^20, a tenth of V3.2's.
Hardware: its weights fill 160 GB; `v4jax inspect` needs a laptop and a second.
Command: v4jax inspect flash
"""

from v4jax.config import ModelConfig
from v4jax.hf.tensors import fp8_quantization


def get_config() -> ModelConfig:
    return ModelConfig(
        initializer_range=0.02, expert_dtype="fp4", quantization=fp8_quantization("ue8m0")
    )
