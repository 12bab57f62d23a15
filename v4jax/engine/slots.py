"""Rows of a decode cache: one taken out, one put in.

A slot is a row of the engine's cache. Every array of a cache has its rows on one axis, so that a
row goes from one cache to another of the same lengths whatever the layers keep.
"""

from typing import Any

import jax

from v4jax.model.cache import Cache

_LAYERS, _COUNTS = 1, 0  # the axis of the rows: of layers' buffers, of lengths and spare


def put(cache: Cache, slot, row: Cache) -> Cache:
    """The cache with `row`, a cache of one row, in the place of a slot."""

    def into(axis):
        def write(buffer, new):
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, axis)

        return write

    return cache.replace(
        lengths=into(_COUNTS)(cache.lengths, row.lengths),
        spare=into(_COUNTS)(cache.spare, row.spare),
        layers=jax.tree.map(into(_LAYERS), cache.layers, row.layers),
    )


def take(cache: Cache, slot) -> Cache:
    """A cache of one row: that of a slot."""

    def out_of(axis):
        def read(buffer):
            return jax.lax.dynamic_slice_in_dim(buffer, slot, 1, axis)

        return read

    return cache.replace(
        lengths=out_of(_COUNTS)(cache.lengths),
        spare=out_of(_COUNTS)(cache.spare),
        layers=jax.tree.map(out_of(_LAYERS), cache.layers),
    )


def put_row(arrays: Any, slot, row: Any) -> Any:
    """Arrays with the rows on their first axis, a slot's replaced by that of `row`, [1,...]."""

    def write(buffer, new):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, 0)

    return jax.tree.map(write, arrays, row)
