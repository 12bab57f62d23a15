"""Muon against AdamW for the matrices, each at four learning rates."""

CONFIG = "configs/train_small.py"
# 120 steps, a quarter of a million tokens.
SHORT = {"stages.0.steps": 120, "schedule.decay": 60, "checkpoint_every": 120, "evaluate_every": 60}
RATES = {"3e-3": 3e-3, "6e-3": 6e-3, "1.2e-2": 1.2e-2, "2.4e-2": 2.4e-2}
RUNS = {
    f"{matrices}_{name}": SHORT
    | {"schedule.final": rate / 50, "schedule.peak": rate, "optimizer.matrices": matrices}
    for matrices in ("muon", "adamw")
    for name, rate in RATES.items()
}
SEEDS = (0, 1, 2)
