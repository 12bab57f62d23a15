"""nano: every kind of layer, MTP, Muon, the indexer's three stages, 4,096 tokens, FP4 at the end.

Expected, hardware, command: see README.md.
"""

from pathlib import Path

from v4jax.datasets.config import DataConfig
from v4jax.named_configs import get_config as named_config
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

TEXT = Path(__file__).parent / "runs" / "text"


def get_config() -> TrainConfig:
    return TrainConfig(
        model=named_config("nano"),
        stages=(
            Stage(steps=480, length=512, batch=8, attention="dense", indexer=0.0),
            Stage(
                steps=20,
                length=1024,
                batch=4,
                attention="dense",
                trained="/indexer/",
                learning_rate=1e-3,
            ),
            Stage(steps=220, length=4096, batch=1),
            Stage(steps=36, length=4096, batch=1, quantized=True),
        ),
        data=DataConfig(kind="text", path=str(TEXT), held_out=0.05),
        schedule=Schedule(peak=8e-3, final=1.6e-4, warm_up=20, decay=400),
        checkpoint_every=100,
        evaluate_every=100,
        evaluate_rows=8,
    )
