"""Sparse attention on TPUs by fetching each chosen row: decode, and contexts beyond tiles.

A query's chosen rows come by one DMA each, a chunk of rows ahead of the arithmetic, and are never
gathered in HBM. DMA cannot address a single row of bf16 [C,H]. Rows in lanes and stored rows
(`entries`) are fetched as they lie; others are packed two channels a 32-bit word first (channel c
low, channel c + H/2 high), which reads and writes all of them once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import membership
from v4jax.kernels.sparse_attention.entries import as_rows
from v4jax.kernels.sparse_attention.stored import StoredRows, tail_row
from v4jax.kernels.sparse_attention.tpu import stored as tpu_stored
from v4jax.kernels.sparse_attention.tpu.product import dot

FEW_QUERIES = 16


class Chosen(NamedTuple):
    """The entries that a query chose: as scalars to fetch by, in VMEM to mask by."""

    scalars: Any
    vector: Any


class Keys(NamedTuple):
    """All keys, in HBM: window rows, and the entries' arrays whose rows are fetched."""

    window: Any
    entries: Any


class Buffers(NamedTuple):
    """Where keys arrive: a double buffer of a chunk of entries, and the window's span."""

    entries: Any
    window: Any
    sem: Any


def serves(plan, sizes, q_BTNH, entries_BCH):
    """Whether rows are fetched one by one: few queries or many entries, of which few are chosen."""
    if not plan.topk or entries_BCH is None:
        return False
    entries = entries_BCH.shape[1]
    few = q_BTNH.shape[1] <= FEW_QUERIES and entries > 4 * plan.topk
    return few or entries > sizes.gather_above


def pack_rows(rows):
    """bf16 [..., H] -> int32 [..., H/2], channels c and c + H/2 in one word; float32 unchanged."""
    if rows.dtype != jnp.bfloat16:
        return rows
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint16).astype(jnp.uint32)
    half = rows.shape[-1] // 2
    word = bits[..., :half] | (bits[..., half:] << 16)
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def _fetchable(entries, dtype, pad_h):
    """The entries as arrays whose rows can be fetched alone."""
    if isinstance(entries, StoredRows):
        return entries
    if entries.ndim == 4 and entries.dtype == dtype and not pad_h:
        return entries
    entries = as_rows(entries).astype(dtype)
    return pack_rows(jnp.pad(entries, ((0, 0), (0, 0), (0, pad_h))))


def _row_of(entries, index):
    """Where an entry lies in each of the arrays."""
    if isinstance(entries, StoredRows):
        return StoredRows(words=index, tails=tail_row(index))
    return index


def _keys(fetched, ids, dtype):
    """The fetched chunk of entries `ids` [1,K] as rows [K,H]."""
    if isinstance(fetched, StoredRows):
        tails = tpu_stored.tails_of_rows(fetched.tails, ids)
        return tpu_stored.expand(fetched.words, tails, dtype)
    if fetched.ndim == 3:
        return fetched.reshape(fetched.shape[0], -1)
    return _unpack(fetched, dtype)


def _unpack(words, dtype):
    if dtype != jnp.bfloat16:
        return words
    low = pltpu.bitcast(words << 16, jnp.float32)
    high = pltpu.bitcast(words & jnp.int32(-65536), jnp.float32)
    return jnp.concatenate([low, high], axis=-1).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def forward(plan, sizes, interpret, q_BTNH, sink_N, window_BSH, entries_BCH, visible):
    """See api.sparse_attention: out [B,T,N,H] of q's dtype and log-sum-exp [B,T,N]."""
    batch, length, heads, width = q_BTNH.shape
    chunk, dtype = sizes.rows, q_BTNH.dtype
    pad_h, pad_n = -width % 256, -heads % 16
    q = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, pad_n), (0, pad_h)))
    entries = _fetchable(entries_BCH, dtype, pad_h)
    chosen = visible.chosen
    if chosen is None:
        chosen = membership.to_indices(visible.member, plan.topk, entries_BCH.shape[1])
    chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, -chosen.shape[2] % chunk)), constant_values=-1)
    chunks = chosen.shape[2] // chunk
    chosen = chosen.reshape(batch, length, chunks, chunk)
    window, span, bounds = _window(plan, q, window_BSH, visible)
    sink = jnp.broadcast_to(jnp.pad(sink_N, (0, pad_n))[:, None], (heads + pad_n, 128))
    heads, width = q.shape[2:]
    keys = Keys(window, entries)
    buffers = Buffers(
        entries=jax.tree.map(lambda x: pltpu.VMEM((2, chunk, *x.shape[2:]), x.dtype), entries),
        window=pltpu.VMEM((span, width), dtype),
        sem=pltpu.SemaphoreType.DMA((3,)),
    )

    def own(*shape, space=None):
        """A query's own."""
        return pl.BlockSpec((1, 1, *shape), lambda b, t: (b, t, 0, 0), memory_space=space)

    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan, chunk, span, dtype),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, length, heads, 128), jnp.float32),
        ),
        grid=(batch, length),
        in_specs=[
            Chosen(scalars=own(chunks, chunk, space=pltpu.SMEM), vector=own(chunks, chunk)),
            own(1, 3, space=pltpu.SMEM),
            own(heads, width),
            pl.BlockSpec((heads, 128), lambda b, t: (0, 0)),
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), keys),
        ],
        out_specs=(own(heads, width), own(heads, 128)),
        scratch_shapes=[buffers],
        name="sparse_attention_gather",
        interpret=interpret,
    )(Chosen(chosen, chosen), bounds, q, sink, keys)
    _, _, n, h = q_BTNH.shape
    return out[:, :, :n, :h], lse[:, :, :n, 0]


def _window(plan, q, window_BSH, visible):
    """Window rows padded so that a query's span begins at a multiple of 16; its row and bounds."""
    batch, length, _, width = q.shape
    span = -(-(plan.window + 16) // 128) * 128
    none = jnp.zeros((batch, length), jnp.int32)
    if window_BSH is None:
        return jnp.zeros((batch, span, width), q.dtype), span, jnp.stack([none] * 3, -1)[:, :, None]
    own = window_BSH.shape[1] - length + jnp.arange(length, dtype=jnp.int32)[None]
    low = jnp.maximum(visible.first, own - plan.window + 1).astype(jnp.int32)
    begin = jnp.maximum(own - plan.window + 1, 0) // 16 * 16
    rows = window_BSH.astype(q.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, span), (0, width - rows.shape[2])))
    bounds = jnp.stack([begin + none, low - begin, own + 1 - begin + none], axis=-1)
    return rows, span, bounds[:, :, None]


def _kernel(plan, chunk, span, dtype, chosen, bounds, q_ref, sink, keys, o_ref, lse_ref, buffers):
    batch = pl.program_id(0)
    heads, width = q_ref.shape[2:]
    chunks = chosen.scalars.shape[2]
    q = q_ref[0, 0]
    begin = pl.multiple_of(bounds[0, 0, 0, 0], 16)
    band = keys.window.at[batch, pl.ds(begin, span)]
    band = pltpu.make_async_copy(band, buffers.window, buffers.sem.at[2])

    def start(c, slot):
        def row(j, carry):
            places = _row_of(keys.entries, jnp.maximum(chosen.scalars[0, 0, c, j], 0))
            arrays = map(jax.tree.leaves, (keys.entries, buffers.entries, places))
            for source, to, place in zip(*arrays, strict=True):
                fetched, to = source.at[batch, pl.ds(place, 1)], to.at[slot, pl.ds(j, 1)]
                pltpu.make_async_copy(fetched, to, buffers.sem.at[slot]).start()
            return carry

        jax.lax.fori_loop(0, chunk, row, 0)

    def attend_tile(kv, seen, carry):
        top, total, acc = carry
        scores = dot(q, kv, ((1,), (1,))) * plan.scale + jnp.where(seen, 0.0, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        shrink = jnp.exp(top - new_top)
        p = jnp.exp(scores - new_top)
        acc = acc * shrink + dot(p.astype(kv.dtype), kv, ((1,), (0,)))
        return new_top, total * shrink + p.sum(-1, keepdims=True), acc

    def body(c, carry):
        slot = jax.lax.rem(c, 2)
        pl.when(c + 1 < chunks)(lambda: start(c + 1, 1 - slot))
        for ref in jax.tree.leaves(buffers.entries):  # one wait for the bytes of the whole chunk
            pltpu.make_async_copy(ref.at[slot], ref.at[slot], buffers.sem.at[slot]).wait()
        ids = chosen.vector[0, 0, pl.ds(c, 1), :]
        fetched = jax.tree.map(lambda ref: ref[slot], buffers.entries)
        return attend_tile(_keys(fetched, ids, dtype), ids >= 0, carry)

    start(0, 0)
    band.start()
    carry = (sink[:, :1], jnp.ones((heads, 1), jnp.float32), jnp.zeros((heads, width), jnp.float32))
    band.wait()
    row = jax.lax.broadcasted_iota(jnp.int32, (1, span), 1)
    seen = (row >= bounds[0, 0, 0, 1]) & (row < bounds[0, 0, 0, 2])
    carry = attend_tile(buffers.window[...], seen, carry)
    top, total, acc = jax.lax.fori_loop(0, chunks, body, carry)
    o_ref[0, 0] = (acc / total).astype(o_ref.dtype)
    lse_ref[0, 0] = jnp.broadcast_to(top + jnp.log(total), (heads, 128))
