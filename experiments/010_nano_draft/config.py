"""A DSpark draft of two stages for nano, trained on nano's own answers.

Expected, hardware, command: see README.md.
"""

import dataclasses
from pathlib import Path

from v4jax.datasets.config import DataConfig
from v4jax.train import config_file
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.draft_loss import DraftLoss
from v4jax.train.optimizer import OptimizerConfig
from v4jax.train.schedule import Schedule

ANSWERS = Path(__file__).parent / "runs" / "answers"


def get_config() -> TrainConfig:
    return dataclasses.replace(
        config_file.read("draft_nano"),
        draft=DraftLoss(anchors=128),
        stages=(Stage(steps=760, length=512, batch=4),),
        data=DataConfig(kind="tokens", path=str(ANSWERS), held_out=0.05),
        optimizer=OptimizerConfig(weight_decay=0.01),
        schedule=Schedule(peak=8e-3, final=1.6e-4, warm_up=20, decay=350),
        evaluate_every=100,
    )
