"""The indexer in plain XLA: blocks of queries, tiles of entries, a threshold found by bisection.

A sort of every row costs several times the scores themselves on a CPU. Instead scores become
integers of the same order, the k-th largest is found bit by bit (exactly), and the members of the
choice are read off a running count, or packed.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels import membership
from v4jax.kernels.indexer_topk import compact_keys, reference, stored_keys
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.indexer_topk.stored_keys import StoredKeys
from v4jax.ops import varying

QUERY_BLOCK = 128
ENTRY_TILE = 1024
COUNT_BLOCK = 64
# Elements of the dot products [B,T,I,C] that dense scores may hold at a time.
DOTS = 1 << 26


def indexer_topk(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, *, native=False):
    """See api.indexer_topk."""

    def everything(low, high):
        entry = low[..., None] + jnp.arange(topk)[None, None]
        return jnp.where(entry < high[..., None], entry, -1).astype(jnp.int32)

    finish = functools.partial(membership.indices_of, topk=topk)
    args = (q_BTIZ, weight_BTI, low_BT, high_BT)
    return _in_blocks(args, keys_BCZ, everything, finish, topk, native)


def indexer_member(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, *, native=False):
    """See api.indexer_member."""
    entries = keys_BCZ.shape[1]

    def everything(low, high):
        entry = jnp.arange(entries)[None, None]
        return membership.pack((entry >= low[..., None]) & (entry < high[..., None]))

    def finish(mask):
        return membership.pack(mask[..., :entries])

    args = (q_BTIZ, weight_BTI, low_BT, high_BT)
    return _in_blocks(args, keys_BCZ, everything, finish, topk, native)


def _in_blocks(args, keys_BCZ, everything, finish, topk, native):
    """A block of queries at a time: everything(low, high), or finish(mask of the choice)."""
    length = args[0].shape[1]
    block = min(QUERY_BLOCK, length)
    padding = -length % block
    if padding:
        args = tuple(jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in args)
    tile = min(ENTRY_TILE, -(-keys_BCZ.shape[1] // COUNT_BLOCK) * COUNT_BLOCK)
    if isinstance(keys_BCZ, CompactKeys) and length > block:
        keys_BCZ = compact_keys.unpack(keys_BCZ)  # once, not for every block of queries
    if isinstance(keys_BCZ, CompactKeys):
        keys_BCZ = compact_keys.pad(keys_BCZ, tile)
    elif isinstance(keys_BCZ, StoredKeys):
        keys_BCZ = stored_keys.pad(keys_BCZ, tile)
    else:
        keys_BCZ = jnp.pad(keys_BCZ, [(0, 0), (0, -keys_BCZ.shape[1] % tile), (0, 0)])
    blocks = (length + padding) // block

    def choose(args):
        """A block whose queries all see at most topk entries takes them all."""
        low, high = args[2:]

        def scored(args):
            return finish(_largest(_ordered_scores(*args, keys_BCZ, tile, native), topk))

        few = jnp.max(high - low) <= topk
        return jax.lax.cond(few, lambda args: everything(low, high), scored, args)

    if blocks == 1:
        return choose(args)[:, :length]

    def one(index):
        return choose(
            tuple(jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1) for x in args)
        )

    chosen = jnp.moveaxis(jax.lax.map(one, jnp.arange(blocks)), 0, 1)
    return chosen.reshape(chosen.shape[0], -1, chosen.shape[-1])[:, :length]


def index_scores(q_BTIZ, weight_BTI, keys_BCZ, *, native=False):
    """See api.index_scores: a tile of keys at a time."""
    tiles = _key_tiles(q_BTIZ, keys_BCZ)
    if tiles.shape[0] == 1:
        return reference.index_scores(q_BTIZ, weight_BTI, keys_BCZ, native=native)

    def one(keys):
        return reference.index_scores(q_BTIZ, weight_BTI, keys, native=native)

    return _joined(jax.lax.map(one, tiles), 2)[:, :, : keys_BCZ.shape[1]]


def index_scores_gradient(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, *, native=False):
    """(dq, dweight, dkeys), float32, a tile of keys at a time."""
    tiles = _key_tiles(q_BTIZ, keys_BCZ)
    gradient = functools.partial(reference.index_scores_gradient, q_BTIZ, weight_BTI, native=native)
    count, _, tile, _ = tiles.shape
    if count == 1:
        return gradient(keys_BCZ, g_BTC)
    g = jnp.pad(g_BTC, [(0, 0), (0, 0), (0, count * tile - g_BTC.shape[2])])
    g = jnp.moveaxis(g.reshape(*g.shape[:2], count, tile), 2, 0)

    def one(sums, args):
        dq, dweight, dkeys = gradient(*args)
        return (sums[0] + dq, sums[1] + dweight), dkeys

    zero = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BTIZ, weight_BTI))
    (dq, dweight), dkeys = jax.lax.scan(one, varying.with_axes_of(zero, g), (tiles, g))
    return dq, dweight, _joined(dkeys, 1)[:, : keys_BCZ.shape[1]]


def _key_tiles(q_BTIZ, keys_BCZ):
    """[tiles, B, tile, Z]: as many keys at a time as keep the dot products within bounds."""
    batch, entries, width = keys_BCZ.shape
    batch, length, heads, _ = q_BTIZ.shape
    tile = max(COUNT_BLOCK, DOTS // (batch * length * heads))
    if tile >= entries:
        return keys_BCZ[None]
    keys = jnp.pad(keys_BCZ, [(0, 0), (0, -entries % tile), (0, 0)])
    return jnp.moveaxis(keys.reshape(batch, -1, tile, width), 1, 0)


def _joined(tiles, axis):
    """Tiles along a leading axis put side by side along `axis`."""
    x = jnp.moveaxis(tiles, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _ordered_scores(q, weight, low, high, keys_BCZ, tile, native):
    """Scores as uint32 of the same order, 0 where an entry is not visible: [B,Q,C]."""
    batch, queries = low.shape
    entries = keys_BCZ.shape[1]

    def body(index, order):
        begin = index * tile
        keys = _tile_of(keys_BCZ, begin, tile)
        scores = reference.index_scores(q, weight, keys, native=native)
        entry = (begin + jnp.arange(tile))[None, None]
        visible = (entry >= low[..., None]) & (entry < high[..., None])
        part = jnp.where(visible, order_preserving(scores), jnp.uint32(0))
        return jax.lax.dynamic_update_slice_in_dim(order, part, begin, axis=2)

    order = jnp.zeros((batch, queries, entries), jnp.uint32)
    if entries == tile:
        return body(0, order)
    order = varying.with_axes_of(order, low)
    return jax.lax.fori_loop(jnp.min(low) // tile, -(-jnp.max(high) // tile), body, order)


def _tile_of(keys_BCZ, begin, tile):
    if isinstance(keys_BCZ, StoredKeys):
        return stored_keys.block(keys_BCZ, begin, tile)
    if isinstance(keys_BCZ, CompactKeys):
        return compact_keys.block(keys_BCZ, begin, tile)
    return jax.lax.dynamic_slice_in_dim(keys_BCZ, begin, tile, axis=1)


def order_preserving(scores):
    """float32 -> uint32 with the same order, all above 0; -0 equals 0, NaN equals -inf."""
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(scores != scores, -jnp.inf, scores)
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits < 0, ~bits, bits | jnp.iinfo(jnp.int32).min)
    return jax.lax.bitcast_convert_type(bits, jnp.uint32)


def _largest(order_BQC, topk):
    """Membership of the topk largest, ties to the lower index, never an invisible one."""
    threshold, enough = _kth_largest(order_BQC, topk)
    at_least = (order_BQC >= threshold[..., None]) & (order_BQC > 0)
    ties = jnp.any(enough > topk)
    return jax.lax.cond(ties, lambda: _drop_late_ties(order_BQC, threshold, topk), lambda: at_least)


def _kth_largest(order_BQC, topk):
    """The largest threshold that at least topk values reach, found from the highest bit down.

    Stops as soon as every row has exactly topk values at or above its threshold.
    """
    count = order_BQC.shape[2]
    rows = order_BQC.shape[:2]

    def unfinished(state):
        bit, _, reached = state
        return (bit >= 0) & jnp.any(reached != topk)

    def step(state):
        bit, threshold, reached = state
        candidate = threshold | (jnp.uint32(1) << bit.astype(jnp.uint32))
        above = jnp.sum(order_BQC >= candidate[..., None], axis=-1, dtype=jnp.int32)
        keep = above >= topk
        return (
            bit - 1,
            jnp.where(keep, candidate, threshold),
            jnp.where(keep, above, reached),
        )

    start = (jnp.int32(31), jnp.zeros(rows, jnp.uint32), jnp.full(rows, count, jnp.int32))
    start = varying.with_axes_of(start, order_BQC)
    _, threshold, reached = jax.lax.while_loop(unfinished, step, start)
    return threshold, reached


def _drop_late_ties(order_BQC, threshold, topk):
    above = order_BQC > threshold[..., None]
    equal = (order_BQC == threshold[..., None]) & (order_BQC > 0)
    wanted = topk - jnp.sum(above, axis=-1, dtype=jnp.int32)
    return above | (equal & (_running_count(equal) <= wanted[..., None]))


def _running_count(mask_BQC):
    """Inclusive count along the last axis, as small triangular matmuls: fast on every backend."""
    batch, queries, count = mask_BQC.shape
    blocks = mask_BQC.reshape(batch, queries, count // COUNT_BLOCK, COUNT_BLOCK)
    triangle = jnp.tril(jnp.ones((COUNT_BLOCK, COUNT_BLOCK), jnp.float32))
    within = jnp.einsum("bqcj,ij->bqci", blocks.astype(jnp.float32), triangle)
    total = within[..., -1]
    before = jnp.cumsum(total, axis=-1) - total
    return (within + before[..., None]).reshape(mask_BQC.shape).astype(jnp.int32)
