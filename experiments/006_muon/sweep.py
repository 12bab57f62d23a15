"""Muon against AdamW for the matrices, each at several learning rates."""

CONFIG = "configs/train_small.py"
# 120 steps, a quarter of a million tokens.
SHORT = {"stages.0.steps": 120, "schedule.decay": 60, "checkpoint_every": 120, "evaluate_every": 60}


def at(rate, **fields):
    return {"schedule.final": rate / 50, "schedule.peak": rate} | fields | SHORT


ADAMW = {"optimizer.matrices": "adamw"}
RUNS = {
    "muon_3e-3": at(3e-3),
    "muon_6e-3": at(6e-3),
    "muon_1.2e-2": at(1.2e-2),
    "adamw_1e-3": at(1e-3) | ADAMW,
    "adamw_3e-3": at(3e-3) | ADAMW,
    "adamw_6e-3": at(6e-3) | ADAMW,
}
SEEDS = (0, 1, 2)
