"""The rival's second run: that of nano (recall.py) without the indexer, from the rival's first.

Expected, hardware, command: see README.md.
"""

import dataclasses
from pathlib import Path

from v4jax.train import config_file
from v4jax.train.config import TrainConfig

HERE = Path(__file__).parent


def get_config() -> TrainConfig:
    rival = config_file.read(str(HERE / "baseline.py"))
    second = config_file.read(str(HERE / "recall.py"))
    stages = [stage for stage in second.stages if stage.trained is None]  # it has no indexer
    return dataclasses.replace(
        second,
        model=rival.model,
        start=str(HERE / "runs" / "baseline_0" / "model"),
        stages=tuple(dataclasses.replace(s, attention="sparse", indexer=0.0) for s in stages),
        losses=rival.losses,
        optimizer=rival.optimizer,
        # Half of its first run's rates, as nano's second run has half of nano's.
        schedule=dataclasses.replace(second.schedule, peak=3e-3, final=6e-5),
    )
