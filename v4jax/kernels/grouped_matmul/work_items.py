"""Work items of a grouped matmul: which rows are multiplied with which group.

Tables of a static length, computed in XLA from the group sizes; items past the last real one repeat
it (a TPU then fetches nothing) and are not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Items(NamedTuple):
    """One entry per item, int32.

    Attributes:
      group_I: the group whose weights the item uses.
      tile_I: its tile of rows.
      begin_I: the group's first row.
      end_I: the row after the group's last.
      count_1: how many items are real.
    """

    group_I: jax.Array
    tile_I: jax.Array
    begin_I: jax.Array
    end_I: jax.Array
    count_1: jax.Array


class Runs(NamedTuple):
    """As `Items`, but an item's rows start where its group does or a tile after another item's.

    Attributes:
      group_I: the group whose weights the item uses.
      row_I: the item's first row.
      end_I: the row after the group's last; 0 if the item is not real.
    """

    group_I: jax.Array
    row_I: jax.Array
    end_I: jax.Array


def tiles(group_sizes_E: jax.Array, rows: int, tile: int, empty: bool = False) -> Items:
    """Every pair of a row tile and a group that has rows in it, in order of rows.

    Args:
      tile: rows of a tile; tiles start at its multiples.
      empty: give an empty group one item too, which no row belongs to.
    """
    sizes_E = group_sizes_E.astype(jnp.int32)
    end_E = jnp.cumsum(sizes_E)
    begin_E = end_E - sizes_E
    count = -(-rows // tile)
    first_E = jnp.minimum(begin_E // tile, count - 1)
    visits_E = jnp.where(sizes_E > 0, (end_E - 1) // tile - first_E + 1, int(empty))
    # A decode step has fewer rows than there are groups, and every item is a step of the grid.
    busy = sizes_E.shape[0] if empty else min(rows, sizes_E.shape[0])
    group_I, nth_I, total = _unrolled(visits_E, count + busy - 1)
    return Items(group_I, first_E[group_I] + nth_I, begin_E[group_I], end_E[group_I], total[None])


def runs(group_sizes_E: jax.Array, rows: int, tile: int) -> Runs:
    """Every group cut into runs of `tile` rows, the last one shorter."""
    sizes_E = group_sizes_E.astype(jnp.int32)
    end_E = jnp.cumsum(sizes_E)
    busy = min(rows, sizes_E.shape[0])
    bound = (rows + busy * (tile - 1)) // tile
    group_I, nth_I, total = _unrolled(-(-sizes_E // tile), bound)
    row_I = (end_E - sizes_E)[group_I] + nth_I * tile
    return Runs(group_I, row_I, jnp.where(jnp.arange(bound) < total, end_E[group_I], 0))


def _unrolled(visits_E, bound):
    """Group and number within the group of each of `bound` visits, and how many are real."""
    last_E = jnp.cumsum(visits_E)
    total = last_E[-1]
    item_I = jnp.clip(jnp.arange(bound, dtype=jnp.int32), 0, jnp.maximum(total - 1, 0))
    # Compared with every group: cheaper than a search, whose steps wait for one another.
    group_I = jnp.sum(last_E[None, :] <= item_I[:, None], axis=1, dtype=jnp.int32)
    group_I = jnp.minimum(group_I, visits_E.shape[0] - 1)
    return group_I, item_I - (last_E - visits_E)[group_I], total


def tile_rows(rows: int, groups: int, least: int, most: int) -> int:
    """The power of two at or above the mean group's size, within `least` and `most`."""
    mean = max(1, -(-rows // groups))
    return max(least, min(most, 1 << (mean - 1).bit_length()))
