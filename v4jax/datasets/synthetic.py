"""Tasks that need a long memory and no text: copying, associative recall, a needle in a haystack.

Ids: 0 begin, 1 end, then the marks below, then symbols. Only answers are targets.
"""

import numpy as np

SEPARATOR, KEY, ASK = 2, 3, 4
FIRST = 5
SHORTEST = 32
KEY_LENGTH, VALUE_LENGTH = 2, 4
PAIR = 1 + KEY_LENGTH + VALUE_LENGTH  # with its mark


def copy(rng: np.random.Generator, length: int, vocab_size: int):
    """Symbols, a separator, the same symbols again; as often as they fit."""
    ids, counts = [], []
    while len(ids) < length:
        size = int(rng.integers(SHORTEST // 4, max(length // 2, SHORTEST // 4 + 1)))
        symbols = rng.integers(FIRST, vocab_size, size).tolist()
        ids += [0, *symbols, SEPARATOR, *symbols]
        counts += [False] * (size + 2) + [True] * size
    return np.array(ids[:length]), np.array(counts[:length])


def recall(rng: np.random.Generator, length: int, vocab_size: int):
    """Pairs of a key and its value, then keys whose values are to be said."""
    keys = rng.permutation(np.arange(FIRST, vocab_size))[: max(2, length // 4)]
    values = rng.integers(FIRST, vocab_size, keys.size)
    told = np.stack([keys, values], axis=1).reshape(-1)
    asked = rng.integers(keys.size, size=-(-length // 3))
    questions = np.stack([np.full(asked.size, ASK), keys[asked], values[asked]], axis=1)
    ids = np.concatenate([[0], told, questions.reshape(-1)])[:length]
    counts = np.zeros(ids.size, bool)
    counts[told.size + 3 :: 3] = True
    return ids, counts


def needle(rng: np.random.Generator, length: int, vocab_size: int):
    """A haystack of symbols with a few marked pairs in it; at its end each key is asked for."""
    pairs = max(1, length // 512)
    asked = pairs * PAIR
    ids = rng.integers(FIRST, vocab_size, length)
    ids[0] = 0
    counts = np.zeros(length, bool)
    # Each needle in a stretch of its own, so that none lies over another.
    stretch = (length - asked - 1) // pairs
    order = rng.permutation(pairs)
    for i in range(pairs):
        at = 1 + i * stretch + int(rng.integers(stretch - PAIR + 1))
        needle_ids = rng.integers(FIRST, vocab_size, PAIR)
        ids[at : at + PAIR] = [KEY, *needle_ids[1:]]
        end = length - asked + int(order[i]) * PAIR
        ids[end : end + PAIR] = [ASK, *needle_ids[1:]]
        counts[end + 1 + KEY_LENGTH : end + PAIR] = True
    return ids, counts


TASKS = {"copy": copy, "recall": recall, "needle": needle}
