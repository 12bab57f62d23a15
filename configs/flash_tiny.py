"""A tiny twin of Flash: its layer pattern, every size cut to run on a laptop in seconds.

Reproduces: the code path of flash.py: window, CSA and HCA layers, hash and scored routing, four
    residual streams, one MTP block, FP8 weights and FP4 experts.
Expected: 1.1 M parameters.
Hardware: one CPU core, seconds.
Command: v4jax inspect flash_tiny
"""

import dataclasses

from v4jax.config import CSA, HCA, WINDOW, ModelConfig, Yarn, with_hash_routing
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    return dataclasses.replace(
        named_config("flash"),
        vocab_size=512,
        hidden_size=64,
        layers=with_hash_routing((WINDOW, WINDOW) + (CSA, HCA) * 4 + (CSA,), 3),
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        sliding_window=32,
        rope_scaling=Yarn(factor=16.0, original_max_position_embeddings=256),
        max_position_embeddings=4096,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
    )
