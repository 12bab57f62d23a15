"""Sparse attention in plain XLA: blocks of queries, an online softmax over tiles of keys.

A block of queries reads its window as one band of rows, then the entries: every tile that some
query of the block may see, masked (`chosen` None, or few entries for each chosen one), or the
chosen rows themselves, gathered a few queries at a time. Tiles beyond the block's range are not
visited. Nothing of size T x S or T x K x H exists. The backward pass recomputes the probabilities
from the saved log-sum-exp, in the same blocks.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax import quant
from v4jax.kernels import membership
from v4jax.kernels.sparse_attention import compact, query_blocks, stored
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.kernels.sparse_attention.entries import as_rows, take
from v4jax.kernels.sparse_attention.stored import StoredRows
from v4jax.ops import varying

# A block is twice the window between these: b queries see b + window - 1 of its rows, masked.
QUERY_BLOCKS = (32, 128)
ENTRY_TILES = (128, 512)
# Masked tiles beat gathered rows while there are at most this many entries for each chosen one.
MASKED_ENTRIES_PER_CHOICE = 4
GATHERED_ELEMENTS = 1 << 22


def forward(plan, q_BTNH, sink_N, window_BSH, entries_BCH, visible):
    """See api.sparse_attention: out [B,T,N,H] of q's dtype and log-sum-exp [B,T,N]."""
    length = q_BTNH.shape[1]
    entries = _expanded(plan, as_rows(entries_BCH), length)
    q, window, entries, visible = _pad(plan, q_BTNH, window_BSH, entries, visible)
    block = _block(plan, length)

    def run(index):
        q_block, start, here = _take_block(block, index, q, visible)
        carry = _start(q_block, sink_N)
        if window is not None:
            kv, mask = _band(plan, block, start, here, window, q.shape[1])
            carry = _absorb(plan, carry, q_block, kv, mask)
        if entries is not None:
            carry = _absorb_entries(plan, carry, q_block, entries, here)
        top, total, acc = carry
        out = quant.round_to(acc / total[..., None], q_BTNH.dtype)
        return out, top + jnp.log(total)

    blocks = q.shape[1] // block
    if blocks == 1:
        out, lse = run(0)
    else:
        out, lse = map(query_blocks.join, jax.lax.map(run, jnp.arange(blocks)))
    return out[:, :length], lse[:, :length]


def _expanded(plan, entries_BCH, length):
    """Compact rows as rows, if more are read than there are: each would be expanded several times.

    A call of few queries expands those that it reads, however long the list is.
    """
    if not isinstance(entries_BCH, CompactRows):
        return entries_BCH
    count = entries_BCH.shape[1]
    gathers = _gathers(plan, entries_BCH)
    read = length * plan.topk if gathers else -(-length // _block(plan, length)) * count
    return compact.unpack(entries_BCH) if read > count else entries_BCH


def _block(plan, length):
    """How many queries there are in a block; without a window, the most."""
    smallest, largest = QUERY_BLOCKS
    queries = max(2 * plan.window, smallest) if plan.window else largest
    return min(queries, largest, length)


def _pad(plan, q_BTNH, window_BSH, entries_BCH, visible):
    """Whole blocks of queries, windows that begin inside the rows, whole tiles of entries."""
    length = q_BTNH.shape[1]
    padding = -length % _block(plan, length)
    pad = functools.partial(query_blocks.pad, after=padding)
    first = visible.first
    if window_BSH is not None:
        short = max(plan.window - 1 - (window_BSH.shape[1] - length), 0)
        window_BSH = query_blocks.pad(window_BSH, before=short, after=padding)
        first = first + short
    if isinstance(entries_BCH, StoredRows):
        sets = -(-entries_BCH.shape[1] // stored.SET)
        entries_BCH = stored.pad(entries_BCH, _tile_size(sets * stored.SET))
    elif isinstance(entries_BCH, CompactRows):
        entries_BCH = compact.pad(entries_BCH, _tile_size(entries_BCH.shape[1]))
    elif entries_BCH is not None:
        tile = _tile_size(entries_BCH.shape[1])
        entries_BCH = query_blocks.pad(entries_BCH, after=-entries_BCH.shape[1] % tile)
    visible = jax.tree.map(pad, visible._replace(first=first))
    return pad(q_BTNH), window_BSH, entries_BCH, visible


def _tile_size(entries):
    """About a quarter of the entries, so that early queries skip most; whole tiles keep it.

    A multiple of 128 unless all entries are fewer, as stored rows want it.
    """
    smallest, largest = ENTRY_TILES
    quarter = -(-entries // (4 * smallest)) * smallest
    return min(entries, quarter, largest)


def _take_block(block, index, q_BTNH, visible):
    start = index * block

    def take(x):
        return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

    return take(q_BTNH).astype(jnp.float32), start, jax.tree.map(take, visible)


def _start(q_BQNH, sink_N):
    """The online softmax begins with the sink: its logit the maximum, weight 1, value 0."""
    top = jnp.broadcast_to(sink_N[None, None], q_BQNH.shape[:3])
    return varying.with_axes_of((top, jnp.ones_like(top), jnp.zeros_like(q_BQNH)), q_BQNH)


def _scores(plan, q_BQNH, kv, mask):
    """Masked scaled scores [B,Q,N,K]; kv [B,K,H] shared by the block or [B,Q,K,H] a query's own."""
    equation = "bqnh,bkh->bqnk" if kv.ndim == 3 else "bqnh,bqkh->bqnk"
    scores = jnp.einsum(equation, q_BQNH, kv) * plan.scale
    return jnp.where(mask[:, :, None], scores, -jnp.inf)


def _absorb(plan, carry, q_BQNH, kv, mask):
    """One tile of keys into the online softmax."""
    top, total, acc = carry
    kv = kv.astype(jnp.float32)
    scores = _scores(plan, q_BQNH, kv, mask)
    new_top = jnp.maximum(top, scores.max(-1))
    shrink = jnp.exp(top - new_top)
    p = jnp.exp(scores - new_top[..., None])
    equation = "bqnk,bkh->bqnh" if kv.ndim == 3 else "bqnk,bqkh->bqnh"
    acc = acc * shrink[..., None] + jnp.einsum(equation, p, kv)
    return new_top, total * shrink + p.sum(-1), acc


def _band(plan, block, start, here, window_BSH, length):
    """The rows that the block's windows cover, and which query sees which."""
    rows = block + plan.window - 1
    begin = start + window_BSH.shape[1] - length - (plan.window - 1)
    kv = jax.lax.dynamic_slice_in_dim(window_BSH, begin, rows, axis=1)
    offset = jnp.arange(rows)[None] - jnp.arange(block)[:, None]
    in_window = (offset >= 0) & (offset < plan.window)
    row = begin + jnp.arange(rows)
    return kv, in_window[None] & (row[None, None] >= here.first[..., None])


def _gathers(plan, entries_BCH):
    return 0 < plan.topk * MASKED_ENTRIES_PER_CHOICE < entries_BCH.shape[1]


def _indices(plan, here, entries):
    """The chosen of so many entries [B,Q,K] in whichever form the choice came."""
    if here.member is None:
        return here.chosen
    return membership.to_indices(here.member, plan.topk, entries)


def _absorb_entries(plan, carry, q, entries_BCH, here):
    if _gathers(plan, entries_BCH):
        return _absorb_gathered(
            plan, carry, q, entries_BCH, _indices(plan, here, entries_BCH.shape[1])
        )
    picked, low, high = _picked(here, entries_BCH.shape[1]), here.low, here.high

    def tile(index, carry):
        kv, mask = _entry_tile(index, entries_BCH, low, high, picked)
        return _absorb(plan, carry, q, kv, mask)

    size = _tile_size(entries_BCH.shape[1])
    if entries_BCH.shape[1] == size:
        return tile(0, carry)
    return jax.lax.fori_loop(*_tile_range(low, high, size), tile, carry)


def _tile_range(low, high, size):
    """The tiles that any query of the block may see."""
    empty = high <= low
    begin = jnp.min(jnp.where(empty, jnp.iinfo(jnp.int32).max, low)) // size
    end = -(-jnp.max(jnp.where(empty, 0, high)) // size)
    return begin, end


def _picked(here, entries):
    """Membership of each entry in a query's choice, [B,Q,C]; None without a choice."""
    if here.member is not None:
        return membership.unpack(here.member, entries)
    if here.chosen is None:
        return None
    chosen_BQK = here.chosen
    batch, queries, _ = chosen_BQK.shape
    b, t = jnp.arange(batch)[:, None, None], jnp.arange(queries)[None, :, None]
    # Negative indices would wrap around: -1 goes past the end, where it is dropped.
    index = jnp.where(chosen_BQK < 0, entries, chosen_BQK)
    mask = jnp.zeros((batch, queries, entries), bool)
    return mask.at[b, t, index].set(True, mode="drop")


def _entry_tile(index, entries_BCH, low, high, picked):
    size = _tile_size(entries_BCH.shape[1])
    begin = index * size
    if isinstance(entries_BCH, StoredRows):
        kv = stored.block(entries_BCH, begin, size)
    elif isinstance(entries_BCH, CompactRows):
        kv = compact.block(entries_BCH, begin, size)
    else:
        kv = jax.lax.dynamic_slice_in_dim(entries_BCH, begin, size, axis=1)
    entry = (begin + jnp.arange(size))[None, None]
    mask = (entry >= low[..., None]) & (entry < high[..., None])
    if picked is not None:
        mask &= jax.lax.dynamic_slice_in_dim(picked, begin, size, axis=2)
    return kv, mask


def _gather_blocks(q, chosen, entries_BCH):
    """How many equal parts of the query block keep the gathered rows under GATHERED_ELEMENTS."""
    rows = q.shape[0] * chosen.shape[2] * entries_BCH.shape[2]
    queries = q.shape[1]
    parts = min(-(-queries * rows // GATHERED_ELEMENTS), queries)
    while queries % parts:
        parts += 1
    return parts


def _absorb_gathered(plan, carry, q, entries_BCH, chosen):
    def part(args):
        carry, q, chosen = args
        return _absorb(plan, carry, q, take(entries_BCH, jnp.maximum(chosen, 0)), chosen >= 0)

    parts = _gather_blocks(q, chosen, entries_BCH)
    if parts == 1:
        return part((carry, q, chosen))
    split = jax.tree.map(lambda x: query_blocks.split(x, parts), (carry, q, chosen))
    return jax.tree.map(query_blocks.join, jax.lax.map(part, split))


def backward(plan, q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout):
    """dq, d(window rows) and d(entries), each of its array's dtype (None for an absent one)."""
    length = q_BTNH.shape[1]
    q, window, entries, visible = _pad(plan, q_BTNH, window_BSH, entries_BCH, visible)
    block = _block(plan, length)
    row = [
        query_blocks.pad(x.astype(jnp.float32), after=-length % block) for x in (dout, delta, lse)
    ]

    def zeros(x):
        return None if x is None else jnp.zeros(x.shape, jnp.float32)

    def run(grads, index):
        dwindow, dentries = grads
        q_block, start, here = _take_block(block, index, q, visible)
        _, _, own = _take_block(block, index, q, tuple(row))
        dq = varying.with_axes_of(jnp.zeros_like(q_block), q_block)
        if window is not None:
            kv, mask = _band(plan, block, start, here, window, q.shape[1])
            dq, dkv = _tile_grads(plan, dq, q_block, kv, mask, own)
            begin = start + window.shape[1] - q.shape[1] - (plan.window - 1)
            dwindow = _add_rows(dwindow, dkv, begin)
        if entries is not None:
            dq, dentries = _entry_grads(plan, dq, q_block, entries, here, own, dentries)
        return (dwindow, dentries), dq

    grads = varying.with_axes_of((zeros(window), zeros(entries)), q)
    (dwindow, dentries), dq = jax.lax.scan(run, grads, jnp.arange(q.shape[1] // block))
    if window is not None:
        before = max(plan.window - 1 - (window_BSH.shape[1] - length), 0)
        dwindow = dwindow[:, before : before + window_BSH.shape[1]].astype(window_BSH.dtype)
    if entries is not None:
        dentries = dentries[:, : entries_BCH.shape[1]].astype(entries_BCH.dtype)
    return query_blocks.join(dq)[:, :length].astype(q_BTNH.dtype), dwindow, dentries


def _tile_grads(plan, dq, q, kv, mask, row):
    """dq with one tile's part added, and the tile's dkv (as key and as value)."""
    dout, delta, lse = row
    kv = kv.astype(jnp.float32)
    own = "bkh" if kv.ndim == 3 else "bqkh"
    p = jnp.exp(_scores(plan, q, kv, mask) - lse[..., None])
    dp = jnp.einsum(f"bqnh,{own}->bqnk", dout, kv)
    ds = p * (dp - delta[..., None]) * plan.scale
    dq = dq + jnp.einsum(f"bqnk,{own}->bqnh", ds, kv)
    dkv = jnp.einsum(f"bqnk,bqnh->{own}", ds, q) + jnp.einsum(f"bqnk,bqnh->{own}", p, dout)
    return dq, dkv


def _add_rows(total, rows, begin):
    old = jax.lax.dynamic_slice_in_dim(total, begin, rows.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + rows, begin, axis=1)


def _entry_grads(plan, dq, q, entries_BCH, here, row, dentries):
    if _gathers(plan, entries_BCH):
        chosen = _indices(plan, here, entries_BCH.shape[1])
        return _gathered_grads(plan, dq, q, entries_BCH, chosen, row, dentries)
    picked, low, high = _picked(here, entries_BCH.shape[1]), here.low, here.high
    size = _tile_size(entries_BCH.shape[1])

    def tile(index, carry):
        dq, dentries = carry
        kv, mask = _entry_tile(index, entries_BCH, low, high, picked)
        dq, dkv = _tile_grads(plan, dq, q, kv, mask, row)
        return dq, _add_rows(dentries, dkv, index * size)

    return jax.lax.fori_loop(*_tile_range(low, high, size), tile, (dq, dentries))


def _gathered_grads(plan, dq, q, entries_BCH, chosen, row, dentries):
    parts = _gather_blocks(q, chosen, entries_BCH)
    batch = jnp.arange(q.shape[0])[:, None, None]

    def part(dentries, args):
        dq, q, chosen, row = args
        dq, dkv = _tile_grads(
            plan, dq, q, take(entries_BCH, jnp.maximum(chosen, 0)), chosen >= 0, row
        )
        return dentries.at[batch, jnp.maximum(chosen, 0)].add(dkv), dq

    split = jax.tree.map(lambda x: query_blocks.split(x, parts), (dq, q, chosen, row))
    dentries, dq = jax.lax.scan(part, dentries, split)
    return query_blocks.join(dq), dentries
