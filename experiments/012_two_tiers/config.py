"""small learns to talk: nano-chat's conversations and texts, from the beginning.

Expected, hardware, command: see README.md.
"""

from pathlib import Path

from v4jax.named_configs import get_config as named_config
from v4jax.train import config_file
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

NANO = config_file.read(str(Path(__file__).parent.parent / "011_nano_chat" / "config.py"))
SHORT = "^(far|[a-m])"  # as 011_nano_chat has them
LONG = "^(?!facts|far)"


def get_config() -> TrainConfig:
    return TrainConfig(
        model=named_config("small"),
        stages=(
            Stage(steps=300, length=512, batch=8, attention="dense", documents=SHORT),
            Stage(steps=400, length=2048, batch=2, attention="dense", documents=LONG),
            Stage(steps=120, length=2048, batch=2, documents=LONG),
            Stage(steps=60, length=4096, batch=1, documents=LONG),
            Stage(steps=15, length=8192, batch=1, documents=LONG),
            Stage(steps=40, length=2048, batch=2, documents=LONG, quantized=True),
        ),
        data=NANO.data,
        schedule=Schedule(peak=4e-3, final=1.6e-4, warm_up=20, decay=350),
        checkpoint_every=NANO.checkpoint_every,
        evaluate_every=NANO.evaluate_every,
        evaluate_rows=NANO.evaluate_rows,
    )
