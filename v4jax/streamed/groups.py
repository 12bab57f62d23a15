"""The chosen experts of one layer and call, in groups that are read and computed one by one.

A token's choices are rows, numbered token * K + choice. Each group has the rows of some experts,
sorted by expert. Only two groups are in memory: one computes while the next is read.
"""

from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """Some of a layer's chosen experts and the rows that chose them.

    Attributes:
      experts: their numbers, ascending.
      source_R: the rows sorted by expert; behind them the number of all rows of the call, which is
        none of them.
      sizes_E: how many rows each expert has; zeros behind the last.
    """

    experts: np.ndarray
    source_R: np.ndarray
    sizes_E: np.ndarray

    @property
    def room(self) -> int:
        """The experts that the compiled program takes: a power of two, so that programs are few."""
        return len(self.sizes_E)


def groups_of(
    chosen_XK: np.ndarray, real_X: np.ndarray, experts: int, most: int
) -> tuple[Group, ...]:
    """Cuts a layer's choices into groups of at most about `most` experts.

    Args:
      chosen_XK: the experts of each token. real_X: which tokens count; padding reads no weights.
      experts: how many there are in the layer.
    """
    rows, k = chosen_XK.size, chosen_XK.shape[1]
    expert_R = chosen_XK.reshape(-1)
    own = np.flatnonzero(np.repeat(real_X, k))
    own = own[np.argsort(expert_R[own], kind="stable")]
    numbers, counts = np.unique(expert_R[own], return_counts=True)
    if not len(numbers):
        return ()
    # Groups of one size, as near as it goes, share one program.
    count = -(-len(numbers) // largest_group(experts, most))
    size = -(-len(numbers) // count)
    starts = range(0, len(numbers), size)
    most_rows = max(int(counts[first : first + size].sum()) for first in starts)
    length, room = min(_power_of_two(most_rows), rows), min(_power_of_two(size), experts)
    ends = np.cumsum(counts)
    found = []
    for first in starts:
        last = min(first + size, len(numbers))
        part = own[ends[first] - counts[first] : ends[last - 1]]
        sizes_E, source_R = np.zeros(room, np.int32), np.full(length, rows, np.int32)
        sizes_E[: last - first], source_R[: len(part)] = counts[first:last], part
        found.append(Group(numbers[first:last], source_R, sizes_E))
    return tuple(found)


def largest_group(experts: int, most: int) -> int:
    """The largest number of experts of a group: a power of two up to `most`, or all there are."""
    if most >= experts:
        return experts
    return max(1, 1 << (most.bit_length() - 1))


def _power_of_two(count):
    return 1 << (count - 1).bit_length()
