"""A whole draft in a minute: two DSpark stages for the model that train_tiny leaves.

Reproduces: the code path of a draft's training (CE, L1 and confidence, blocks behind anchors).
Expected: 40 steps lower the loss; such a model and such a draft predict next to nothing.
Hardware: two CPU cores, about a minute, most of it compiling.
Command: v4jax train --config configs/draft_tiny.py --workdir draft --config.start=tiny/model
"""

import dataclasses
from pathlib import Path

from v4jax.config import DSpark
from v4jax.named_configs import config_file
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.config_file import run_file
from v4jax.train.draft_loss import DraftLoss
from v4jax.train.optimizer import OptimizerConfig
from v4jax.train.schedule import Schedule


def get_config() -> TrainConfig:
    target = run_file(Path(config_file("train_tiny"))).get_config()
    draft = DSpark(block_size=4, markov_rank=8, noise_token_id=0, target_layer_ids=(1, 2))
    return dataclasses.replace(
        target,
        model=dataclasses.replace(target.model, mtp_layers=(), draft_layers=2, dspark=draft),
        draft=DraftLoss(anchors=16),
        start="tiny/model",
        stages=(Stage(steps=40, length=128),),
        optimizer=OptimizerConfig(matrices="adamw", weight_decay=0.0),
        schedule=Schedule(peak=6e-3, final=1e-4, warm_up=2, decay=20),
        evaluate_every=20,
    )
