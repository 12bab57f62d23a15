"""A cache's buffers of rows of keys, in the form in which they are kept.

[R,B,C,...] in the activations' type, or in stored form a pytree of arrays (`CompactRows`,
`CompactKeys`) that have rows, or blocks of rows (`lane_blocks`), on axis 2.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.kernels import lane_blocks
from v4jax.kernels.indexer_topk import compact_keys
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.sparse_attention import compact
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.kernels.sparse_attention.entries import lanes_of
from v4jax.ops import varying


class Activations:
    """Empty buffers in the activations' type."""

    def __init__(self, config, dtype, parts):
        self._width, self._index_width = config.head_dim, config.index_head_dim
        self._dtype, self._parts = dtype, parts

    def window(self, lead, count):
        return jnp.zeros((*lead, count, self._width), self._dtype)

    def rows(self, lead, most):
        return jnp.zeros((*lead, _room(most, self._parts), self._width), self._dtype)

    def entries(self, lead, most):
        room = _room(most, self._parts)
        return jnp.zeros((*lead, room, *lanes_of(self._width)), self._dtype)

    def keys(self, lead, most):
        return jnp.zeros((*lead, _room(most, self._parts), self._index_width), self._dtype)


class Native:
    """Empty buffers in stored form; a part holds whole blocks."""

    def __init__(self, config, parts):
        self._widths = config.head_dim, config.qk_rope_head_dim
        self._index_width, self._parts = config.index_head_dim, parts

    def window(self, lead, count):
        return compact.empty(lead, count, *self._widths)

    def rows(self, lead, most):
        return compact.empty(lead, *self._room(most, *self._widths))

    entries = rows

    def keys(self, lead, most):
        return compact_keys.empty(lead, *self._room(most, self._index_width))

    def _room(self, most, *widths):
        room = _room(most, self._parts)
        return room, *widths, lane_blocks.size_of(room // self._parts)


def _room(entries: int, parts: int) -> int:
    """Entries to make room for: whole tiles, which the kernels then need not pad (and copy)."""
    part = -(-entries // parts)
    tile = 64 if part <= 512 else 1024
    return -(-part // tile) * tile * parts


def row_axes(window: Any, leading: int = 2) -> Any:
    """The axis along which each array of a window has its rows; leading: axes before them.

    A window lies in a single block.
    """
    if isinstance(window, CompactRows):
        return dataclasses.replace(window, words=leading, low=leading + 2, scales=leading + 2)
    return leading


def in_blocks(buffer: Any) -> Any:
    """Of each array of a buffer whether its rows lie in blocks."""
    if isinstance(buffer, CompactRows):
        return dataclasses.replace(buffer, words=False, low=True, scales=True)
    if isinstance(buffer, CompactKeys):
        return dataclasses.replace(buffer, codes=True, scales=True)
    return False


def as_stored(buffer: Any, rows: jax.Array) -> Any:
    """Rows [...,K,H] in the form of a buffer."""
    if isinstance(buffer, CompactRows):
        return compact.pack(rows, buffer.rope)
    if isinstance(buffer, CompactKeys):
        return compact_keys.pack(rows)
    return rows.astype(buffer.dtype)


def write_rows(buffer: Any, layer, rows_BKH, start_B, count_B) -> Any:
    """Writes rows[b, :count[b]] at buffer[layer, b, start[b]:], in place under jit.

    One row of the batch after the other: a write that is batched over them becomes a scatter, for
    which XLA copies the whole buffer.
    """
    rows = as_stored(buffer, rows_BKH)

    def one(b, buffer):
        def array(x, rows, blocked):
            write = write_blocks if blocked else _write_rows
            return write(x, rows[b], layer, b, start_B[b], count_B[b])

        return jax.tree.map(array, buffer, rows, in_blocks(buffer))

    buffer = varying.with_axes_of(buffer, layer, rows, start_B, count_B)
    if rows_BKH.shape[0] > 1:
        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rows_BKH.shape[0]), one, buffer)

    def if_any(buffer):
        """XLA:CPU repeats a bare write inside what reads the buffer, and copies it for that."""
        return jax.lax.cond(count_B[0] > 0, write, lambda buffer: buffer, buffer)

    write = functools.partial(one, jnp.int32(0))
    return jax.lax.platform_dependent(buffer, cpu=if_any, default=write)


def _write_rows(x, rows_KX, layer, b, start, count):
    entry, size = x.shape[3:], x.shape[2]  # (H,), or H in lanes
    length = min(rows_KX.shape[0], size)
    # The slice may not reach over the end, or it would be moved: it begins earlier instead.
    # Below 0 it begins where rows of the buffer of another shard end.
    first = jnp.clip(start, 0, size - length)
    source = jnp.arange(length, dtype=jnp.int32) + first - start
    begin = slice_start(x, layer, b, first)
    old = jax.lax.dynamic_slice(x, begin, (1, 1, length, *entry))
    new = rows_KX[jnp.clip(source, 0, length - 1)].reshape(old.shape)
    fresh = (source >= 0) & (source < count)
    merged = jnp.where(fresh.reshape(1, 1, -1, *(1 for _ in entry)), new, old)
    return jax.lax.dynamic_update_slice(x, merged, begin)


def write_blocks(x, rows_1XK, layer, b, start, count):
    """The blocks that the rows touch, with the rows in them."""
    words, size = x.shape[3:]
    blocks = lane_blocks.spanning(rows_1XK.shape[2], x)
    first = lane_blocks.first_block(start, blocks, x)
    source = size * first - start + jnp.arange(blocks * size, dtype=jnp.int32)
    begin = slice_start(x, layer, b, first)
    old = jax.lax.dynamic_slice(x, begin, (1, 1, blocks, words, size))
    new = rows_1XK[0, :, jnp.clip(source, 0, rows_1XK.shape[2] - 1)]  # [blocks * size, words]
    new = jnp.swapaxes(new.reshape(1, 1, blocks, size, words), 3, 4)
    fresh = ((source >= 0) & (source < count)).reshape(1, 1, blocks, 1, size)
    return jax.lax.dynamic_update_slice(x, jnp.where(fresh, new, old), begin)


def slice_start(x, layer, row, first):
    """Where a slice of an array begins, in one type: with JAX_ENABLE_X64 a 0 would be wider."""
    return tuple(jnp.int32(i) for i in (layer, row, first, *(0 for _ in x.shape[3:])))


def read_layer(buffer: Any, layer) -> Any:
    """buffer[layer]: [B,C,H]."""
    take = jax.lax.dynamic_index_in_dim
    return jax.tree.map(lambda x: take(x, layer, axis=0, keepdims=False), buffer)


def write_layer(buffer: Any, layer, rows: Any) -> Any:
    """buffer with buffer[layer] replaced (the small rows: window and raw)."""

    def one(x, rows):
        return jax.lax.dynamic_update_index_in_dim(x, rows.astype(x.dtype), layer, axis=0)

    return jax.tree.map(one, buffer, rows)
