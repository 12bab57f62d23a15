"""nano and its rival, side by side."""

RUNS = {"nano": {"config": "config.py"}, "baseline": {"config": "baseline.py"}}
SEEDS = (0,)
CONFIG = "config.py"
