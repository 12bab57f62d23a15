"""Four residual streams against two and against a plain residual, equal parameters."""

CONFIG = "configs/train_small.py"
# Wider experts make up for the mixing weights that fewer streams do without.
RUNS = {
    "mhc_4": {},
    "mhc_2": {"model.hc_mult": 2, "model.moe_intermediate_size": 70},
    "plain": {"model.hc_mult": 1, "model.moe_intermediate_size": 71},
}
SEEDS = (0, 1, 2)
