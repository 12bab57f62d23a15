"""A second run over longer rows, from the end of the first (config.py) on, if that was too short.

Expected, hardware, command: see README.md.
"""

import dataclasses
from pathlib import Path

from v4jax.train import config_file
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

HERE = Path(__file__).parent
LONG = "^(?!facts|far)"


def get_config() -> TrainConfig:
    first = config_file.read(str(HERE / "config.py"))
    return dataclasses.replace(
        first,
        start=str(HERE / "runs" / "chat" / "model"),
        stages=(
            Stage(steps=300, length=2048, batch=2, documents=LONG),
            Stage(steps=60, length=4096, batch=1, documents=LONG),
            Stage(steps=60, length=2048, batch=2, documents=LONG, quantized=True),
        ),
        data=dataclasses.replace(first.data, seed=1),  # other conversations
        schedule=Schedule(peak=3e-3, final=1.6e-4, warm_up=10, decay=300),
    )
