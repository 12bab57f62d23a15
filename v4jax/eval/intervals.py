"""Means with intervals, pass^k, and whether two runs differ."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Values = Sequence[float] | np.ndarray

RESAMPLES = 2000
_PARTS = 1 << 22  # draws at a time, so that long lists need no more memory


def mean_interval(values: Values, seed: int = 0) -> dict[str, Any]:
    """The mean with its 95 % bootstrap interval, {"n", "mean", "low", "high"}."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return {"n": 0, "mean": math.nan, "low": math.nan, "high": math.nan}
    low, high = _quantiles(values, seed)
    return {"n": len(values), "mean": float(values.mean()), "low": low, "high": high}


def _quantiles(values, seed):
    rng = np.random.default_rng(seed)
    rows = max(1, _PARTS // len(values))
    means = [
        values[rng.integers(0, len(values), (min(rows, RESAMPLES - at), len(values)))].mean(1)
        for at in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def pass_hat(successes: int, trials: int, k: int) -> float | None:
    """The chance that k trials drawn from those made all succeed: C(c, k) / C(n, k).

    None, not 0, where fewer than k were made.
    """
    if trials < k:
        return None
    return math.comb(successes, k) / math.comb(trials, k)


def paired(first: Values, second: Values, seed: int = 0) -> dict[str, Any]:
    """How much better the second of two runs is on the same samples.

    Returns:
      "n", "mean" difference with "low" and "high" of its 95 % bootstrap interval, and "p": how
      often a difference as large comes about if every pair's two scores are swapped at random
      (two-sided, exact up to 12 pairs that differ, else of 10,000 draws).
    """
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    return mean_interval(difference, seed) | {"p": _sign_flip(difference, seed)}


def _sign_flip(difference, seed):
    moved = difference[difference != 0]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum())
    if len(moved) <= 12:
        grid = np.indices((2,) * len(moved)).reshape(len(moved), -1)
        sums = np.abs((1 - 2 * grid.T) @ moved)
        return float(np.mean(sums >= observed - 1e-12))
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (10_000, len(moved))) * 2 - 1
    # The observed order is one of the draws, so that p is never 0.
    return float((np.sum(np.abs(signs @ moved) >= observed - 1e-12) + 1) / 10_001)
