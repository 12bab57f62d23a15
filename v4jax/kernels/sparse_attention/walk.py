"""Padded arrays, each query's bounds, and the tiles that a tile of queries or keys walks over."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels import membership
from v4jax.kernels.sparse_attention import stored
from v4jax.kernels.sparse_attention.stored import StoredRows

BOUNDS = 128  # bounds stand in the first four lanes of a row of 128, which DMA can address


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Padded sizes: `count` tiles of `queries` queries with `heads` heads of `width` channels."""

    queries: int
    keys: int
    heads: int
    width: int
    count: int

    @property
    def rows(self):
        """Rows of a tile: its queries' heads."""
        return self.queries * self.heads

    @property
    def lanes(self):
        """Rows of 128 that hold one number per row."""
        return -(-self.rows // 128)

    def pad_queries(self, x_BTNH):
        """[B,T,N,H] padded to whole tiles, heads and lanes."""
        _, length, heads, width = x_BTNH.shape
        after = (self.count * self.queries - length, self.heads - heads, self.width - width)
        return jnp.pad(x_BTNH, [(0, 0), *((0, a) for a in after)])

    def to_lanes(self, x_BTN):
        """[B,T,N] -> [B, count, lanes, 128]."""
        batch, length, heads = x_BTN.shape
        after = (self.count * self.queries - length, self.heads - heads)
        x = jnp.pad(x_BTN, [(0, 0), *((0, a) for a in after)])
        x = x.reshape(batch, self.count, self.rows)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.lanes * 128 - self.rows)))
        return x.reshape(batch, self.count, self.lanes, 128)

    def from_lanes(self, x, like_BTNH):
        """The inverse of `to_lanes`."""
        batch, length, heads, _ = like_BTNH.shape
        x = x.reshape(batch, self.count, self.lanes * 128)[:, :, : self.rows]
        x = x.reshape(batch, self.count * self.queries, self.heads)
        return x[:, :length, :heads]

    def unpad_keys(self, dkeys, like):
        """A gradient without the padding, of its array's dtype."""
        return dkeys[:, : like.shape[1], : like.shape[2]].astype(like.dtype)


def unprepare(tiles, like_BTNH, x):
    """[B,T,N,H] without the padding."""
    _, length, heads, width = like_BTNH.shape
    return x[:, :length, :heads, :width]


class Given(NamedTuple):
    """What the TPU kernels read, padded.

    Attributes:
      q, window, entries: as api's; an array that is absent is a tile of zeros.
      bounds: [B,T,128]; each query sees window rows [x0, x1) and entries [x2, x3).
      member: the mask's words, int32.
      walk: for each tile of queries its key tiles, [B, count, 1, 4 + ...] (`_walk`).
      window_walk, entries_walk: for each key tile its tiles of queries, [B, tiles, 1, 2 + ...]
        (`_query_walk`).
    """

    q: jax.Array
    window: jax.Array
    entries: jax.Array | StoredRows
    bounds: jax.Array
    member: jax.Array
    walk: jax.Array
    window_walk: jax.Array
    entries_walk: jax.Array


def prepare(plan, sizes, q_BTNH, window_BSH, entries_BCH, visible) -> tuple[Tiles, Given]:
    """The tiles and what is cut into them."""
    batch, length, heads, width = q_BTNH.shape
    tiles = Tiles(
        queries=sizes.queries,
        keys=sizes.keys,
        heads=-(-heads // 16) * 16,
        width=-(-width // 128) * 128,
        count=-(-length // sizes.queries),
    )
    window = _pad_keys(tiles, window_BSH, q_BTNH)
    entries = _pad_keys(tiles, entries_BCH, q_BTNH)
    # Computed once and stored: a v5p's compiler may stop at minima over numbers that it makes up.
    bounds = jax.lax.optimization_barrier(query_bounds(plan, window_BSH, batch, length, visible))
    bounds = jnp.pad(bounds, ((0, 0), (0, tiles.count * tiles.queries - length), (0, 0)))
    member = _member(plan, tiles, entries_BCH, visible, batch)
    sees_window = _range_seen(tiles, bounds[..., 0], bounds[..., 1], window.shape[1])
    if plan.topk:
        sees_entries = _chosen_seen(tiles, member, entries.shape[1])
    else:
        sees_entries = _range_seen(tiles, bounds[..., 2], bounds[..., 3], entries.shape[1])
    walk = _walk(plan, sees_window, sees_entries)
    window_walk = _query_walk(sees_window, listed=False)
    entries_walk = _query_walk(sees_entries, listed=bool(plan.topk))
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, BOUNDS - 4)))
    q = tiles.pad_queries(q_BTNH)
    member = jax.lax.bitcast_convert_type(member, jnp.int32)
    return tiles, Given(q, window, entries, bounds, member, walk, window_walk, entries_walk)


def _pad_keys(tiles, x, like):
    if x is None:
        return jnp.zeros((like.shape[0], tiles.keys, tiles.width), like.dtype)
    if isinstance(x, StoredRows):
        return stored.pad(x, tiles.keys)
    x = x.astype(like.dtype)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tiles.keys), (0, tiles.width - x.shape[2])))


def query_bounds(plan, window_BSH, batch, length, visible):
    """[B,T,4]: a query sees window rows [x0, x1) and entries [x2, x3)."""
    none = jnp.zeros((batch, length), jnp.int32)
    low, high = (none, none) if visible.low is None else (visible.low, visible.high)
    first = end = none
    if window_BSH is not None:
        row = window_BSH.shape[1] - length + jnp.arange(length, dtype=jnp.int32)[None]
        first, end = jnp.maximum(visible.first, row - plan.window + 1), row + 1 + none
    return jnp.stack([x.astype(jnp.int32) for x in (first, end, low, high)], axis=-1)


def _member(plan, tiles, entries_BCH, visible, batch):
    """The packed choice of every padded query, uint32; one empty group where there is none."""
    length = tiles.count * tiles.queries
    if not plan.topk:
        return jnp.zeros((batch, length, membership.LANES), jnp.uint32)
    member = visible.member
    if member is None:
        member = membership.from_indices(visible.chosen, entries_BCH.shape[1])
    return jnp.pad(member, ((0, 0), (0, length - member.shape[1]), (0, 0)))


def _range_seen(tiles, low_BT, high_BT, keys):
    """Whether a tile of queries sees anything of a key tile, by position: [B, count, key tiles]."""
    shape = (low_BT.shape[0], tiles.count, tiles.queries)
    low, high = low_BT.reshape(shape), high_BT.reshape(shape)
    empty = high <= low
    low = jnp.where(empty, jnp.iinfo(jnp.int32).max, low).min(-1)[..., None]
    high = jnp.where(empty, 0, high).max(-1)[..., None]
    begin = tiles.keys * jnp.arange(keys // tiles.keys, dtype=jnp.int32)[None, None]
    return (low < begin + tiles.keys) & (high > begin)


def _chosen_seen(tiles, member_BTW, keys):
    """Whether a tile of queries has chosen anything of a key tile: [B, count, key tiles]."""
    batch, _, count = member_BTW.shape
    word = member_BTW.reshape(batch, tiles.count, tiles.queries, count)
    word = jax.lax.reduce(word, jnp.uint32(0), jax.lax.bitwise_or, (2,))
    word = word.reshape(batch, tiles.count, count // membership.LANES, membership.LANES)
    word = jax.lax.reduce(word, jnp.uint32(0), jax.lax.bitwise_or, (3,))
    bit = jnp.arange(membership.BITS, dtype=jnp.uint32)[None, None, None]
    hit = ((word[..., None] >> bit) & 1).astype(bool)
    hit = hit.reshape(batch, tiles.count, -1, tiles.keys // membership.LANES).any(-1)
    return hit[:, :, : keys // tiles.keys]


def _walk(plan, sees_window, sees_entries):
    """[first window tile, number, first entry tile, number, the next chosen tile of each ...]."""
    parts = [*_first_and_count(sees_window), *_first_and_count(sees_entries)]
    walk = jnp.stack(parts, axis=-1)
    if plan.topk:
        walk = jnp.concatenate([walk, _next(sees_entries)], axis=-1)
    return walk[:, :, None]


def _query_walk(sees_BXY, listed):
    """The query tiles to walk for each key tile.

    Listed: [first, number, the next of each ...]. Else [first, number] of neighbours, from the
    first that sees any of the key tile to the last: in a packed row tiles of queries that see no
    entry lie between, and add nothing under their mask.
    """
    sees = jnp.swapaxes(sees_BXY, 1, 2)
    if not listed:
        return jnp.stack(_first_and_span(sees), axis=-1)[:, :, None]
    parts = jnp.stack(_first_and_count(sees), axis=-1)
    return jnp.concatenate([parts, _next(sees)], axis=-1)[:, :, None]


def _first_and_span(mask):
    """The first place where a mask is true, and the number of places from it to the last."""
    first, behind = (jnp.argmax(x, axis=-1) for x in (mask, jnp.flip(mask, axis=-1)))
    span = jnp.where(mask.any(-1), mask.shape[-1] - behind - first, 0)
    return first.astype(jnp.int32), span.astype(jnp.int32)


def _first_and_count(mask):
    """The first place where a mask is true, and in how many it is."""
    return jnp.argmax(mask, axis=-1).astype(jnp.int32), mask.sum(-1, dtype=jnp.int32)


def _next(mask):
    """For every place the next one where a mask is true: a list to walk, made without a sort."""
    count = mask.shape[-1]
    place = jnp.arange(count, dtype=jnp.int32)[None, None]
    here = jnp.where(mask, place, count)
    after = jax.lax.cummin(here, axis=2, reverse=True)
    return jnp.pad(after[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=count)
