"""The indexer's loss on and off (an indexer of random weights), at two widths of its choice."""

CONFIG = "configs/train_small.py"
# 120 steps, a quarter of a million tokens. A row of 512 tokens has up to 128 entries.
SHORT = {"stages.0.steps": 120, "schedule.decay": 60, "checkpoint_every": 120, "evaluate_every": 60}
RUNS = {
    f"top{topk}_{name}": {"model.index_topk": topk, "losses.indexer": weight} | SHORT
    for topk in (4, 16)
    for name, weight in (("on", 1.0), ("off", 0.0))
}
SEEDS = (0, 1, 2)
