"""A whole training recipe in a minute: every kind of layer, MTP, Muon, the indexer's three stages.

Reproduces: the code path of a full run: dense stage, indexer warm-up, sparse stage.
Expected: 60 steps from about 5.6 to about 4 nats a byte of the standard library.
Hardware: two CPU cores, about two minutes, half of them compiling.
Command: v4jax train --config configs/train_tiny.py --workdir tiny
"""

from v4jax.config import CSA, HCA, WINDOW, ModelConfig, Yarn, with_hash_routing
from v4jax.datasets.config import DataConfig
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=288,
            hidden_size=32,
            layers=with_hash_routing((WINDOW, CSA, HCA), 1),
            num_attention_heads=2,
            head_dim=32,
            qk_rope_head_dim=8,
            q_lora_rank=16,
            o_groups=2,
            o_lora_rank=16,
            sliding_window=16,
            rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=256),
            max_position_embeddings=4096,
            index_n_heads=4,
            index_head_dim=16,
            index_topk=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            initializer_range=0.02,
            dtype="float32",
        ),
        stages=(
            Stage(steps=20, length=128, attention="dense", indexer=0.0),
            Stage(steps=10, length=128, attention="dense", trained="/indexer/", learning_rate=1e-3),
            Stage(steps=30, length=128),
        ),
        data=DataConfig(kind="python", tokenizer="bytes", documents=200, held_out=0.05),
        schedule=Schedule(peak=6e-3, final=1e-4, warm_up=5, decay=15),
        checkpoint_every=10,
        evaluate_every=30,
        evaluate_rows=8,
    )
