"""The indexer's loss on and off (an indexer of random weights), at three widths of its choice."""

CONFIG = "configs/train_small.py"
RUNS = {
    f"top{topk}_{name}": {"model.index_topk": topk, "losses.indexer": weight}
    for topk in (4, 16, 64)
    for name, weight in (("on", 1.0), ("off", 0.0))
}
SEEDS = (0, 1, 2)
