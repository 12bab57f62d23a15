"""Muon against AdamW for the matrices, each at three learning rates."""

CONFIG = "configs/train_small.py"


def at(rate, **fields):
    return {"schedule.final": rate / 50, "schedule.peak": rate} | fields


ADAMW = {"optimizer.matrices": "adamw"}
RUNS = {
    "muon_3e-3": at(3e-3),
    "muon_6e-3": at(6e-3),
    "adamw_1e-3": at(1e-3) | ADAMW,
    "adamw_3e-3": at(3e-3) | ADAMW,
    "adamw_6e-3": at(6e-3) | ADAMW,
}
SEEDS = (0, 1, 2)
