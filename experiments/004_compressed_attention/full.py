"""train_small with full attention in every layer; experts of width 70 bring it to equal parameters.

Expected, hardware, command: see README.md.
"""

import dataclasses
from pathlib import Path

from v4jax.config import FULL, with_hash_routing
from v4jax.train import config_file
from v4jax.train.config import TrainConfig

BASE = Path(__file__).parents[2] / "configs" / "train_small.py"


def get_config() -> TrainConfig:
    config = config_file.read(str(BASE))
    layers = with_hash_routing((FULL,) * len(config.model.layers), 1)
    model = dataclasses.replace(config.model, layers=layers, moe_intermediate_size=70)
    return dataclasses.replace(config, model=model)
