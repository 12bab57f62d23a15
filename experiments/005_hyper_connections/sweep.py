"""Four residual streams against two and against a plain residual, equal parameters."""

CONFIG = "configs/train_small.py"
# 120 steps, a quarter of a million tokens.
SHORT = {"stages.0.steps": 120, "schedule.decay": 60, "checkpoint_every": 120, "evaluate_every": 60}
# Wider experts make up for the mixing weights that fewer streams do without.
RUNS = {
    "mhc_4": SHORT,
    "mhc_2": {"model.hc_mult": 2, "model.moe_intermediate_size": 70} | SHORT,
    "plain": {"model.hc_mult": 1, "model.moe_intermediate_size": 71} | SHORT,
}
SEEDS = (0, 1, 2)
