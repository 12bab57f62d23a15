"""nano learns to talk: conversations with facts, tools and rules, mixed with its code and facts.

Expected, hardware, command: see README.md.
"""

import dataclasses
from pathlib import Path

from v4jax.config import ModelConfig, Yarn
from v4jax.datasets.config import DataConfig
from v4jax.named_configs import get_config as named_config
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

HERE = Path(__file__).parent
GROWN = HERE / "runs" / "grown"
TEXT = HERE.parent / "000_nano" / "runs" / "recall_text"
SHORT = "^(far|[a-m])"  # half of the code, and facts in short pieces of it
LONG = "^(?!facts|far)"  # code, and facts in long pieces of it


def model() -> ModelConfig:
    """nano with room for the chat's special tokens, and twice its positions."""
    return dataclasses.replace(
        named_config("nano"),
        vocab_size=2112,
        rope_scaling=Yarn(factor=8.0, original_max_position_embeddings=1024),
        max_position_embeddings=8192,
    )


def get_config() -> TrainConfig:
    return TrainConfig(
        model=model(),
        start=str(GROWN),
        stages=(
            Stage(steps=200, length=512, batch=8, attention="dense", documents=SHORT),  # no tools
            Stage(steps=550, length=2048, batch=2, attention="dense", documents=LONG),
            Stage(steps=200, length=2048, batch=2, documents=LONG),
            Stage(steps=120, length=4096, batch=1, documents=LONG),
            Stage(steps=30, length=8192, batch=1, documents=LONG),
            Stage(steps=60, length=2048, batch=2, documents=LONG, quantized=True),
        ),
        data=DataConfig(
            kind="conversations",
            path=str(TEXT),
            tokenizer=str(GROWN),
            held_out=0.05,
            share=0.75,
        ),
        schedule=Schedule(peak=4e-3, final=1.6e-4, warm_up=20, decay=400),
        checkpoint_every=50,
        evaluate_every=50,
        evaluate_rows=16,
    )
