"""DeepSeek-V4-Pro, the instruct release: 1573.0 B parameters, 48.85 B active.

Reproduces: the config.json of the official checkpoint (FP8 weights, routed experts in FP4).
Expected: 145,116 tensors of 864,704,792,696 bytes; 5031.4 KV bytes a token; 319 G FLOPs a decoded
    token at a context of 2^20, 27 % of V3.2's.
Hardware: its weights fill 865 GB; `v4jax inspect` needs a laptop and a second.
Command: v4jax inspect pro
"""

import dataclasses

from v4jax.config import CSA, HCA, ModelConfig, with_hash_routing
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    return dataclasses.replace(
        named_config("flash"),
        hidden_size=7168,
        layers=with_hash_routing((HCA, HCA) + (CSA, HCA) * 29 + (CSA,), 3),
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    )
