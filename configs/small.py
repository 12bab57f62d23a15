"""nano's larger sibling, for a laptop: the reviewer of experiments/012_two_tiers. No weights ship.

Reproduces: nothing published; nano's pattern with seven layers, twice as wide, twice the experts'
width, nano-chat's vocabulary and positions.
Expected: 23.6 M parameters and 3.4 M in the MTP block; not trained yet, so no loss is known.
Hardware: two CPU cores.
Command: v4jax train --config experiments/012_two_tiers/config.py --workdir small
"""

import dataclasses

from v4jax.config import CSA, HCA, WINDOW, ModelConfig, Yarn, with_hash_routing
from v4jax.named_configs import get_config as named_config


def get_config() -> ModelConfig:
    return dataclasses.replace(
        named_config("nano"),
        vocab_size=2112,
        hidden_size=384,
        layers=with_hash_routing((WINDOW, WINDOW, CSA, HCA, CSA, HCA, CSA), 2),
        num_attention_heads=6,
        q_lora_rank=192,
        o_groups=2,
        o_lora_rank=128,
        rope_scaling=Yarn(factor=8.0, original_max_position_embeddings=1024),
        max_position_embeddings=8192,
        index_topk=64,
        moe_intermediate_size=256,
    )
