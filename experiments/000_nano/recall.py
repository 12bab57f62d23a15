"""nano's second run: from the end of the first (config.py) on, it learns to look facts up.

Expected, hardware, command: see README.md.
"""

from pathlib import Path

from v4jax.datasets.config import DataConfig
from v4jax.named_configs import get_config as named_config
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

RUNS = Path(__file__).parent / "runs"
LONG = "^(?!facts|far)"  # code, and long.jsonl
DENSE = {"attention": "dense", "indexer": 0.0}


def get_config() -> TrainConfig:
    return TrainConfig(
        model=named_config("nano"),
        start=str(RUNS / "nano_0" / "model"),
        stages=(
            Stage(steps=400, length=512, batch=4, documents="^(facts|far|[achw])", **DENSE),
            Stage(steps=150, length=512, batch=4, documents="^(far|[hw])", **DENSE),
            Stage(
                steps=30,
                length=2048,
                batch=2,
                attention="dense",
                documents=LONG,
                trained="/indexer/",
                learning_rate=4e-3,
            ),
            Stage(steps=130, length=4096, batch=1, documents=LONG),
            Stage(steps=20, length=4096, batch=1, documents=LONG, quantized=True),
        ),
        data=DataConfig(
            kind="text",
            path=str(RUNS / "recall_text"),
            tokenizer=str(RUNS / "nano_0" / "model"),
            held_out=0.05,
        ),
        schedule=Schedule(peak=4e-3, final=1.6e-4, warm_up=10, decay=180),
        checkpoint_every=40,
        evaluate_every=40,
        evaluate_rows=16,
    )
