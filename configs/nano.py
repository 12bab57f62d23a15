"""The small model that comes with v4jax, real though small: every kind of layer, trained on Python.

Reproduces: nothing published; it is Flash's pattern with five layers, in the official layout.
Expected: 5.0 M parameters, 0.9 M in the MTP block; 6.1 MB with FP8 weights and FP4 experts.
Hardware: two CPU cores.
Command: v4jax generate (how it was trained: experiments/000_nano)
"""

import dataclasses

from v4jax.config import CSA, HCA, WINDOW, ModelConfig, Yarn, with_hash_routing
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    return dataclasses.replace(
        named_config("flash"),
        vocab_size=2048,
        hidden_size=192,
        layers=with_hash_routing((WINDOW, WINDOW, CSA, HCA, CSA), 2),
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=96,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=64,
        rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=1024),
        max_position_embeddings=4096,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        initializer_range=0.02,
    )
