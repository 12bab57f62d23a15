"""The base of the ablations: a small model of every kind of layer, trained on Python's own library.

Reproduces: nothing published; Flash's pattern, Muon, MTP and the indexer's loss at laptop size.
Expected: about 3.3 nats a token held out after 400 steps (0.8 M tokens of a BPE of 1,024).
Hardware: two CPU cores, about seven minutes.
Command: v4jax train --config configs/train_small.py --workdir small
"""

from v4jax.config import CSA, HCA, WINDOW, ModelConfig, Yarn, with_hash_routing
from v4jax.datasets.config import DataConfig
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=1024,
            hidden_size=96,
            layers=with_hash_routing((WINDOW, CSA, HCA, CSA), 1),
            num_attention_heads=4,
            head_dim=32,
            qk_rope_head_dim=8,
            q_lora_rank=48,
            o_groups=2,
            o_lora_rank=48,
            sliding_window=32,
            rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=512),
            max_position_embeddings=4096,
            index_n_heads=4,
            index_head_dim=32,
            index_topk=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            initializer_range=0.02,
            dtype="float32",
        ),
        stages=(Stage(steps=400, length=512),),
        data=DataConfig(kind="python", held_out=0.05),
        schedule=Schedule(peak=6e-3, final=1.2e-4, warm_up=20, decay=200),
        checkpoint_every=100,
        evaluate_every=100,
        evaluate_rows=16,
    )
