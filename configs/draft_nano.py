"""A DSpark draft of two stages for nano, trained on Python's own library.

Reproduces: nothing published; the loss of the DSpark paper at laptop size.
Expected: 1.98 tokens per round at temperature 1 on held-out text (experiments/010_nano_draft).
Hardware: two CPU cores, about six minutes.
Command: v4jax train --config configs/draft_nano.py --workdir run
"""

import dataclasses
from pathlib import Path

import v4jax
from v4jax.config import DSpark
from v4jax.datasets.config import DataConfig
from v4jax.named_configs import get_config as named_config
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.draft_loss import DraftLoss
from v4jax.train.optimizer import OptimizerConfig
from v4jax.train.schedule import Schedule

NANO = Path(v4jax.__file__).parent / "data" / "nano"  # its tokenizer too


def get_config() -> TrainConfig:
    # Token 0 begins a document and stands nowhere else: it is free to mean "not yet known".
    draft = DSpark(block_size=5, markov_rank=64, noise_token_id=0, target_layer_ids=(2, 3, 4))
    return TrainConfig(
        model=dataclasses.replace(
            named_config("nano"), mtp_layers=(), draft_layers=2, dspark=draft
        ),
        draft=DraftLoss(anchors=64),
        start="nano",
        stages=(Stage(steps=259, length=512, batch=4),),
        data=DataConfig(kind="python", tokenizer=str(NANO), held_out=0.05),
        optimizer=OptimizerConfig(matrices="adamw", weight_decay=0.0),
        schedule=Schedule(peak=3e-3, final=1e-4, warm_up=20, decay=60),
        checkpoint_every=100,
        evaluate_every=37,
        evaluate_rows=16,
    )
