"""small learns to talk: nano-chat's conversations and texts, from the beginning.

Expected, hardware, command: see README.md.
"""

from pathlib import Path

from v4jax.datasets.config import DataConfig
from v4jax.named_configs import get_config as named_config
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

HERE = Path(__file__).parent
GROWN = HERE.parent / "011_nano_chat" / "runs" / "grown"  # its tokenizer has the chat's tokens
TEXT = HERE.parent / "000_nano" / "runs" / "recall_text"
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
        data=DataConfig(
            kind="conversations",
            path=str(TEXT),
            tokenizer=str(GROWN),
            held_out=0.05,
            share=0.75,
        ),
        schedule=Schedule(peak=4e-3, final=1.6e-4, warm_up=20, decay=350),
        checkpoint_every=50,
        evaluate_every=50,
        evaluate_rows=16,
    )
