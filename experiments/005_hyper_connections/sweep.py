"""Four residual streams against two and against a plain residual, equal parameters."""

CONFIG = "configs/train_small.py"
# 150 steps, 0.3 M tokens: nine runs in three quarters of an hour.
SHORT = {"stages.0.steps": 150, "schedule.decay": 75, "checkpoint_every": 50, "evaluate_every": 75}
# Wider experts make up for the mixing weights that fewer streams do without.
RUNS = {
    "mhc_4": SHORT,
    "mhc_2": {"model.hc_mult": 2, "model.moe_intermediate_size": 70} | SHORT,
    "plain": {"model.hc_mult": 1, "model.moe_intermediate_size": 71} | SHORT,
}
SEEDS = (0, 1, 2)
