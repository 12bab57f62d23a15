"""Window + CSA + HCA against full attention, equal parameters, at two lengths of equal tokens."""

CONFIG = "configs/train_small.py"
# 120 steps, a quarter of a million tokens.
SHORT = {"stages.0.steps": 120, "schedule.decay": 60, "checkpoint_every": 120, "evaluate_every": 60}
LONG = {"stages.0.length": 2048, "stages.0.batch": 1} | SHORT
RUNS = {
    "csa_hca_512": SHORT,
    "full_512": {"config": "full.py"} | SHORT,
    "csa_hca_2048": LONG,
    "full_2048": {"config": "full.py"} | LONG,
}
SEEDS = (0, 1, 2)
