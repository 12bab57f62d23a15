"""Tables from token id to experts for hash-routed layers, even over a text's tokens."""

import numpy as np
from jaxtyping import Int


def hash_table(
    count_V: Int[np.ndarray, " v"], experts: int, k: int, seed: int
) -> Int[np.ndarray, "v k"]:
    """K distinct experts for each id, int32, such that a text loads all experts alike.

    Greedy, from the most frequent id down: the K experts with the least load so far. Ties fall at
    random, so that layers with different seeds pair experts differently. A single id with more
    than K / E of all tokens cannot be made even by any table.

    Args:
      count_V: how often each id stands in the text.
    """
    rng = np.random.default_rng(seed)
    load = np.zeros(experts)
    table = np.zeros((count_V.size, k), np.int32)
    for token in np.argsort(-count_V, kind="stable"):
        chosen = np.lexsort((rng.random(experts), load))[:k]
        table[token] = chosen
        load[chosen] += count_V[token] + 1  # ids that never occur are spread too
    return table
