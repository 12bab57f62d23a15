"""nano's rival: full attention, a plain residual and AdamW, equal parameters, text and tokens.

Expected, hardware, command: see README.md.
"""

import dataclasses
from pathlib import Path

from v4jax.config import FULL, with_hash_routing
from v4jax.train import config_file
from v4jax.train.config import TrainConfig

NANO = Path(__file__).parent / "config.py"


def get_config() -> TrainConfig:
    config = config_file.read(str(NANO))
    model = dataclasses.replace(
        config.model,
        layers=with_hash_routing((FULL,) * len(config.model.layers), 2),
        hc_mult=1,
        # Wider latents instead of compressors, indexers and mixing weights.
        q_lora_rank=204,
        o_lora_rank=112,
    )
    stages = [stage for stage in config.stages if stage.trained is None]  # it has no indexer
    return dataclasses.replace(
        config,
        model=model,
        stages=tuple(dataclasses.replace(s, attention="sparse", indexer=0.0) for s in stages),
        losses=dataclasses.replace(config.losses, indexer=0.0),
        optimizer=dataclasses.replace(config.optimizer, matrices="adamw"),
        schedule=dataclasses.replace(config.schedule, peak=6e-3, final=1.2e-4),  # best in 006_muon
    )
