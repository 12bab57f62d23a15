"""A tiny twin of Pro: its layer pattern (no window layer), every size cut for a laptop.

Reproduces: the code path of pro.py: it starts with two HCA layers, both routed by hash.
Expected: 2.3 M parameters.
Hardware: one CPU core, seconds.
Command: v4jax inspect pro_tiny
"""

import dataclasses

from v4jax.config import CSA, HCA, ModelConfig, with_hash_routing
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    return dataclasses.replace(
        named_config("flash_tiny"),
        hidden_size=96,
        layers=with_hash_routing((HCA, HCA) + (CSA, HCA) * 4 + (CSA,), 3),
        num_attention_heads=8,
        q_lora_rank=48,
        o_groups=4,
        index_topk=32,
        n_routed_experts=12,
        routed_scaling_factor=2.5,
    )
