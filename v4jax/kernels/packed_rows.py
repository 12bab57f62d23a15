"""What queries see in rows that hold several documents: for the cases of kernels that take it."""

from collections.abc import Sequence

import numpy as np


def ranges(
    documents: Sequence[Sequence[int]], length: int, ratio: int, reverse: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """first, low and high, int32 [B, length], and how many entries the fullest row has.

    A document of n tokens has n // ratio entries, and its token p sees (p + 1) // ratio of them.
    The entries of a row stand in one list, in the order of its documents or (`reverse`) in the
    opposite one, so that ranges decrease from one document to the next.

    Args:
      documents: lengths of each row's documents; what they leave of a row is one more.
    """
    rows = [_row(lengths, length, ratio, reverse) for lengths in documents]
    first, low, high, entries = zip(*rows, strict=True)
    return *(np.stack(x).astype(np.int32) for x in (first, low, high)), max(entries)


def _row(lengths, length, ratio, reverse):
    lengths = np.array([*lengths, length - sum(lengths)])
    blocks = lengths // ratio
    before = np.cumsum(blocks) - blocks
    if reverse:
        before = blocks.sum() - before - blocks
    document = np.repeat(np.arange(len(lengths)), lengths)
    first = (np.cumsum(lengths) - lengths)[document]
    low = before[document]
    return first, low, low + (np.arange(length) - first + 1) // ratio, int(blocks.sum())
