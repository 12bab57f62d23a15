"""The indexer in plain XLA: blocks of queries, tiles of entries, a threshold found by bisection.

A sort of every row costs several times the scores themselves on a CPU. Instead scores become
integers of the same order, the k-th largest is found bit by bit (exactly), and the members of the
choice are read off a running count.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.indexer_topk import reference

QUERY_BLOCK = 128
ENTRY_TILE = 1024
COUNT_BLOCK = 64


def indexer_topk(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, *, chain=False):
    """See api.indexer_topk."""
    length = q_BTIZ.shape[1]
    block = min(QUERY_BLOCK, length)
    args = (q_BTIZ, weight_BTI, low_BT, high_BT)
    padding = -length % block
    if padding:
        args = tuple(jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in args)
    tile = min(ENTRY_TILE, -(-keys_BCZ.shape[1] // COUNT_BLOCK) * COUNT_BLOCK)
    keys_BCZ = jnp.pad(keys_BCZ, [(0, 0), (0, -keys_BCZ.shape[1] % tile), (0, 0)])
    choose = functools.partial(_choose, keys_BCZ=keys_BCZ, tile=tile, topk=topk, chain=chain)
    blocks = (length + padding) // block
    if blocks == 1:
        return choose(args)[:, :length]

    def one(index):
        return choose(
            tuple(jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1) for x in args)
        )

    chosen = jnp.moveaxis(jax.lax.map(one, jnp.arange(blocks)), 0, 1)
    return chosen.reshape(chosen.shape[0], -1, topk)[:, :length]


def _choose(args, keys_BCZ, tile, topk, chain):
    """One block's choice. A block whose queries all see at most topk entries takes them all."""
    low, high = args[2:]

    def everything(args):
        entry = low[..., None] + jnp.arange(topk)[None, None]
        return jnp.where(entry < high[..., None], entry, -1).astype(jnp.int32)

    def scored(args):
        order = _ordered_scores(*args, keys_BCZ, tile, chain)
        return _members(_largest(order, topk), topk)

    return jax.lax.cond(jnp.max(high - low) <= topk, everything, scored, args)


def _ordered_scores(q, weight, low, high, keys_BCZ, tile, chain):
    """Scores as uint32 of the same order, 0 where an entry is not visible: [B,Q,C]."""
    batch, queries = low.shape
    entries = keys_BCZ.shape[1]

    def body(index, order):
        begin = index * tile
        keys = jax.lax.dynamic_slice_in_dim(keys_BCZ, begin, tile, axis=1)
        scores = reference.index_scores(q, weight, keys, chain=chain)
        entry = (begin + jnp.arange(tile))[None, None]
        visible = (entry >= low[..., None]) & (entry < high[..., None])
        part = jnp.where(visible, order_preserving(scores), jnp.uint32(0))
        return jax.lax.dynamic_update_slice_in_dim(order, part, begin, axis=2)

    order = jnp.zeros((batch, queries, entries), jnp.uint32)
    if entries == tile:
        return body(0, order)
    return jax.lax.fori_loop(jnp.min(low) // tile, -(-jnp.max(high) // tile), body, order)


def order_preserving(scores):
    """float32 -> uint32 with the same order and -0 equal to 0; finite values map above 0."""
    scores = jnp.where(scores == 0, 0.0, scores)
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
    _, threshold, reached = jax.lax.while_loop(unfinished, step, start)
    return threshold, reached


def _drop_late_ties(order_BQC, threshold, topk):
    above = order_BQC > threshold[..., None]
    equal = (order_BQC == threshold[..., None]) & (order_BQC > 0)
    wanted = topk - jnp.sum(above, axis=-1, dtype=jnp.int32)
    return above | (equal & (_running_count(equal) <= wanted[..., None]))


def _running_count(mask_BQC):
    """Inclusive count along the last axis, as small triangular matmuls: quick on every backend."""
    batch, queries, count = mask_BQC.shape
    blocks = mask_BQC.reshape(batch, queries, count // COUNT_BLOCK, COUNT_BLOCK)
    triangle = jnp.tril(jnp.ones((COUNT_BLOCK, COUNT_BLOCK), jnp.float32))
    within = jnp.einsum("bqcj,ij->bqci", blocks.astype(jnp.float32), triangle)
    total = within[..., -1]
    before = jnp.cumsum(total, axis=-1) - total
    return (within + before[..., None]).reshape(mask_BQC.shape).astype(jnp.int32)


def _members(mask_BQC, topk):
    """The indices at which the mask is set, ascending, -1 after the last: [B,Q,K]."""
    count = _running_count(mask_BQC)
    slot = jnp.arange(1, topk + 1)

    def row(count):
        return jnp.searchsorted(count, slot, side="left", method="scan_unrolled")

    index = jax.vmap(jax.vmap(row))(count).astype(jnp.int32)
    return jnp.where(slot[None, None] <= count[..., -1:], index, -1)
