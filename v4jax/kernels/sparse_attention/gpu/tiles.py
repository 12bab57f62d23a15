"""Sparse attention on NVIDIA GPUs (Pallas Triton): one query's heads are the rows of a tile.

A program takes one query and a block of its heads, and walks over that query's own keys: its
window rows, then its range of entries or its chosen entries, whose rows it loads by index. Nothing
is gathered in memory first and no masked key costs arithmetic. Stored rows (`stored`) are loaded as
they are; keys, queries and sums are then cut into blocks of channels. Backward without atomics: dq
walks the same keys; a range of keys (window rows, HCA entries) collects its gradient over the
queries that see it; for chosen entries each (query, choice) writes its part and a second kernel
adds the parts of an entry in a fixed order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels import blocks, membership
from v4jax.kernels.sparse_attention import query_blocks
from v4jax.kernels.sparse_attention.entries import as_rows
from v4jax.kernels.sparse_attention.gpu import stored as gpu_stored
from v4jax.kernels.sparse_attention.stored import PLANES, StoredRows
from v4jax.kernels.sparse_attention.walk import query_bounds

PARTS_BYTES = 1 << 30
PROGRAMS = 264  # two for every multiprocessor of an H100


def refuse(plan, q_BTNH, window_BSH, entries_BCH):
    """Why the kernel cannot take these arguments, or None."""
    for name, x in (("q", q_BTNH), ("window", window_BSH), ("entries", entries_BCH)):
        if x is None or isinstance(x, StoredRows):
            continue
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}; supported: float32, bfloat16"
    if q_BTNH.shape[3] > 512:
        return f"head width (h) is {q_BTNH.shape[3]}; supported: at most 512"
    needed, have = _shared_bytes(q_BTNH), blocks.MEMORY["h100"]
    if needed > have:
        return (
            f"tiles of {_tile(q_BTNH)} and {_tile(q_BTNH, backward=True)} need {needed} bytes of "
            f"shared memory and there are {have}; choose smaller ones"
        )
    return None


def _shared_bytes(q_BTNH):
    """q, do and every stage of keys, as operands of the tensor cores."""
    width, item = pl.next_power_of_2(q_BTNH.shape[3]), q_BTNH.dtype.itemsize
    forward, backward = _tile(q_BTNH), _tile(q_BTNH, backward=True)
    rows = max(
        forward.heads + forward.stages * forward.keys,
        2 * backward.heads + backward.stages * backward.keys,
    )
    return rows * width * item


# What a kernel reads, by name. The same tuple holds the arrays outside, their blocks, and inside a
# kernel the references.


class Keys(NamedTuple):
    """What a query walks over: its bounds, its choice, all keys; entries may be `StoredRows`."""

    bounds: Any
    chosen: Any
    window: Any
    entries: Any


class Row(NamedTuple):
    """A query and what its gradient takes: log-sum-exp, and delta = do.o."""

    q: Any
    do: Any
    lse: Any
    delta: Any


class _Tile(NamedTuple):
    """Heads of one query against keys, the warps that share them, and stages of loads."""

    heads: int
    keys: int
    warps: int
    stages: int


def _tile(q_BTNH, backward=False, is_stored=False):
    """bf16 tiles come from the table: the gradients hold q, do and an accumulator and spill sooner.
    float32 is for checks and takes small ones.
    """
    sizes = blocks.blocks("cuda").sparse_attention
    if q_BTNH.dtype != jnp.bfloat16:
        return _Tile(16, 16, 4, 1)
    tile = _Tile(sizes.heads, sizes.keys, sizes.warps, sizes.stages)
    if is_stored:
        tile = tile._replace(keys=sizes.stored_keys, stages=sizes.stored_stages)
    if backward:
        tile = _Tile(
            sizes.backward_heads, sizes.backward_keys, sizes.backward_warps, sizes.backward_stages
        )
    return tile._replace(heads=min(tile.heads, max(16, pl.next_power_of_2(q_BTNH.shape[2]))))


def _parameters(tile):
    return plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def _prepare(plan, tile, q_BTNH, window_BSH, entries_BCH, visible):
    """q and keys of power-of-two widths and whole head blocks, bounds [B,T,4], chosen [B,T,K]."""
    batch, length, heads, width = q_BTNH.shape
    pad_h = pl.next_power_of_2(max(width, 16)) - width
    pad_n = -heads % tile.heads
    q = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, pad_n), (0, pad_h)))

    def keys(x):
        if x is None:
            return jnp.zeros((batch, 1, width + pad_h), q.dtype)
        if isinstance(x, StoredRows):
            return x
        return jnp.pad(x.astype(q.dtype), ((0, 0), (0, 0), (0, pad_h)))

    bounds = query_bounds(plan, window_BSH, batch, length, visible)
    chosen = jnp.full((batch, length, tile.keys), -1, jnp.int32)
    if plan.topk:
        chosen = visible.chosen
        if chosen is None:
            chosen = membership.to_indices(visible.member, plan.topk, entries_BCH.shape[1])
        missing = -chosen.shape[2] % tile.keys
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    return q, Keys(bounds, chosen, keys(window_BSH), keys(entries_BCH))


def forward(plan, q_BTNH, sink_N, window_BSH, entries_BCH, visible, *, interpret):
    """See api.sparse_attention: out [B,T,N,H] of q's dtype and log-sum-exp [B,T,N]."""
    arrays = (q_BTNH, sink_N, window_BSH, as_rows(entries_BCH), visible)
    tile = _tile(q_BTNH, is_stored=isinstance(entries_BCH, StoredRows))
    return _forward(plan, tile, interpret, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(plan, tile, interpret, q_BTNH, sink_N, window_BSH, entries_BCH, visible):
    q, keys = _prepare(plan, tile, q_BTNH, window_BSH, entries_BCH, visible)
    batch, length, heads, width = q.shape
    sink = jnp.pad(sink_N, (0, heads - sink_N.shape[0]))
    rows, column = _query_specs(tile.heads, width)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan, tile.keys),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        grid=(batch, length, heads // tile.heads),
        in_specs=[_key_specs(keys), rows, pl.BlockSpec((tile.heads,), lambda b, t, n: (n,))],
        out_specs=(rows, column),
        compiler_params=_parameters(tile),
        name="sparse_attention_forward",
        interpret=interpret,
    )(keys, q, sink)
    _, _, n, h = q_BTNH.shape
    return out[:, :, :n, :h], lse[:, :, :n]


def _query_specs(block, width):
    """A block of one query's heads: [block, width] rows and one number a head."""
    rows = pl.BlockSpec((None, None, block, width), lambda b, t, n: (b, t, n, 0))
    return rows, pl.BlockSpec((None, None, block), lambda b, t, n: (b, t, n))


def _key_specs(keys):
    """One query's bounds and choice, and all of its row's keys."""

    def own(x):
        return pl.BlockSpec((None, None, x.shape[2]), lambda b, t, n: (b, t, 0))

    def whole(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, t, n: (b, 0, 0))

    return Keys(
        bounds=own(keys.bounds),
        chosen=own(keys.chosen),
        window=whole(keys.window),
        entries=jax.tree.map(whole, keys.entries),
    )


def _load_rows(ref, index_K, seen_K, parts=1):
    """Rows of an array [rows, width] by index, zero where not seen, as blocks of their channels."""
    columns = ref.shape[1] // parts
    index = jnp.where(seen_K, index_K, 0)
    mask = jnp.broadcast_to(seen_K[:, None], (index.shape[0], columns))

    def part(i):
        column = i * columns + jnp.arange(columns)
        return plt.load(ref.at[index[:, None], column[None, :]], mask=mask, other=0.0)

    return [part(i) for i in range(parts)]


def _dot(a, b, trans_a=False, trans_b=False):
    """float32 product; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=precision)


def _channel_blocks(keys):
    """In how many blocks of channels a tile of keys comes: stored rows expand to planes."""
    return PLANES if isinstance(keys.entries, StoredRows) else 1


def _walk_keys(plan, size, keys, attend_tile, carry):
    """`attend_tile(parts, seen, carry)` for every tile of one query's keys.

    parts: the tile as blocks of channels.
    """
    bounds, chosen, window, entries = keys

    def load_window(index, seen):
        return _load_rows(window, index, seen, _channel_blocks(keys))

    def load_entries(index, seen):
        if isinstance(entries, StoredRows):
            return gpu_stored.load(entries, index, seen, window.dtype)
        return _load_rows(entries, index, seen)

    def in_range(load, low, high, carry):
        def body(j, carry):
            index = low + j * size + jnp.arange(size)
            seen = index < high
            return attend_tile(load(index, seen), seen, carry)

        return jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(high - low, 0), size), body, carry)

    carry = in_range(load_window, bounds[0], bounds[1], carry)
    if not plan.topk:
        return in_range(load_entries, bounds[2], bounds[3], carry)

    def body(j, carry):
        index = chosen[pl.ds(j * size, size)]
        seen = index >= 0
        return attend_tile(load_entries(index, seen), seen, carry)

    return jax.lax.fori_loop(0, chosen.shape[0] // size, body, carry)


def _forward_kernel(plan, size, keys, q_ref, sink_ref, o_ref, lse_ref):
    heads, width = q_ref.shape
    parts = _channel_blocks(keys)
    columns = [pl.ds(i * (width // parts), width // parts) for i in range(parts)]
    q = [q_ref[:, own] for own in columns]

    def attend_tile(kv, seen, carry):
        top, total, acc = carry
        scores = sum(_dot(q_part, part, trans_b=True) for q_part, part in zip(q, kv, strict=True))
        scores = jnp.where(seen[None, :], scores * plan.scale, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        p = jnp.exp(scores - new_top[:, None])
        rounded = p.astype(kv[0].dtype)
        acc = [a * shrink[:, None] + _dot(rounded, part) for a, part in zip(acc, kv, strict=True)]
        return new_top, total * shrink + p.sum(-1), acc

    acc = [jnp.zeros((heads, width // parts), jnp.float32)] * parts
    start = (sink_ref[...], jnp.ones((heads,), jnp.float32), acc)
    top, total, acc = _walk_keys(plan, size, keys, attend_tile, start)
    for own, part in zip(columns, acc, strict=True):
        o_ref[:, own] = (part / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = top + jnp.log(total)


def backward(plan, q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout, *, interpret):
    """dq, d(window rows) and d(entries), each of its array's dtype (None for an absent one)."""
    arrays = (q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout)
    return _backward(plan, _tile(q_BTNH, backward=True), interpret, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(plan, tile, interpret, q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout):
    q, keys = _prepare(plan, tile, q_BTNH, window_BSH, entries_BCH, visible)
    after = [(0, large - small) for large, small in zip(q.shape, dout.shape, strict=True)]
    do = jnp.pad(dout.astype(q.dtype), after)
    row = Row(q, do, jnp.pad(lse, after[:3]), jnp.pad(delta, after[:3]))
    dq = _dq(plan, tile, interpret, row, keys)
    dwindow = dentries = None
    if window_BSH is not None:
        own = (keys.bounds[..., 0], keys.bounds[..., 1])
        dwindow = _range_gradient(plan, tile, interpret, row, *own, keys.window)
        dwindow = _unpad_keys(dwindow, window_BSH)
    if entries_BCH is not None:
        if plan.topk:
            dentries = _chosen_gradient(plan, tile, interpret, row, keys.chosen, keys.entries)
        else:
            own = (keys.bounds[..., 2], keys.bounds[..., 3])
            dentries = _range_gradient(plan, tile, interpret, row, *own, keys.entries)
        dentries = _unpad_keys(dentries, entries_BCH)
    _, _, n, h = q_BTNH.shape
    return dq[:, :, :n, :h], dwindow, dentries


def _unpad_keys(dkeys, like):
    return dkeys[:, : like.shape[1], : like.shape[2]].astype(like.dtype)


def _dq(plan, tile, interpret, row, keys):
    batch, length, heads, width = row.q.shape
    rows, column = _query_specs(tile.heads, width)
    return pl.pallas_call(
        functools.partial(_dq_kernel, plan, tile.keys),
        out_shape=jax.ShapeDtypeStruct(row.q.shape, row.q.dtype),
        grid=(batch, length, heads // tile.heads),
        in_specs=[_key_specs(keys), Row(q=rows, do=rows, lse=column, delta=column)],
        out_specs=rows,
        compiler_params=_parameters(tile),
        name="sparse_attention_dq",
        interpret=interpret,
    )(keys, row)


def _load_row(ref: Row, at):
    """Some heads of a query."""
    return Row(*(x[at] for x in ref))


def _score_gradient(plan, row: Row, kv, seen):
    """Probabilities and ds = p (do.v - delta) * scale, [heads, keys]."""
    scores = _dot(row.q, kv, trans_b=True) * plan.scale
    p = jnp.where(seen, jnp.exp(scores - row.lse[:, None]), 0.0)
    return p, p * (_dot(row.do, kv, trans_b=True) - row.delta[:, None]) * plan.scale


def _dq_kernel(plan, size, keys, row_ref, dq_ref):
    row = _load_row(row_ref, ...)

    def attend_tile(parts, seen, dq):
        (kv,) = parts
        _, ds = _score_gradient(plan, row, kv, seen[None, :])
        return dq + _dot(ds.astype(kv.dtype), kv)

    dq = _walk_keys(plan, size, keys, attend_tile, jnp.zeros(row.q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _range_gradient(plan, tile, interpret, row, low_BT, high_BT, keys):
    """The gradient of keys that queries see by position, float32 [B, keys, width].

    A program walks from the first query that sees anything of its key tile to the last (`_spans`).
    Where there are few key tiles the walk is cut into equal parts, and the parts' sums added.
    """
    batch, length, _, width = row.q.shape
    count = keys.shape[1]
    size, tiles = tile.keys, pl.cdiv(count, tile.keys)
    keys = jnp.pad(keys, ((0, 0), (0, tiles * size - count), (0, 0)))
    span = _spans(low_BT, high_BT, size * jnp.arange(tiles, dtype=jnp.int32), size)
    parts = max(1, min(length, PROGRAMS // (batch * tiles)))

    def whole(x):
        zeros = (0,) * (x.ndim - 1)
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, j, part: (b, *zeros))

    own = pl.BlockSpec((None, size, width), lambda b, j, part: (b, j, 0))
    dkeys = pl.pallas_call(
        functools.partial(_range_kernel, plan, tile.heads, parts),
        out_shape=jax.ShapeDtypeStruct((parts, *keys.shape), jnp.float32),
        grid=(batch, tiles, parts),
        in_specs=[
            pl.BlockSpec((None, None, 2), lambda b, j, part: (b, j, 0)),
            own,
            whole(low_BT),
            whole(high_BT),
            jax.tree.map(whole, row),
        ],
        out_specs=pl.BlockSpec((None, None, size, width), lambda b, j, part: (part, b, j, 0)),
        compiler_params=_parameters(tile),
        name="sparse_attention_range_gradient",
        interpret=interpret,
    )(span, keys, low_BT, high_BT, row)
    return dkeys.sum(0)[:, :count]


def _spans(low_BT, high_BT, begin_J, size):
    """[B,J,2]: the queries to walk for the keys [begin, begin + size), first to last plus one.

    Ranges of queries may stand in any order. Of the queries so far the largest `high` and of those
    still to come the smallest `low` do not decrease, whatever the ranges do, and say where the
    first and the last query stand that can see the tile.
    """
    empty = high_BT <= low_BT
    high = jax.lax.cummax(jnp.where(empty, 0, high_BT), axis=1)
    low = jnp.where(empty, jnp.iinfo(jnp.int32).max, low_BT)
    low = jax.lax.cummin(low, axis=1, reverse=True)
    find = jax.vmap(functools.partial(jnp.searchsorted, side="right"), in_axes=(0, None))
    first = find(high, begin_J)
    end = jax.vmap(jnp.searchsorted, in_axes=(0, None))(low, begin_J + size)
    return jnp.stack([first, jnp.maximum(first, end)], axis=-1).astype(jnp.int32)


def _range_kernel(plan, block, parts, span, kv_ref, low, high, row_ref, out):
    size, _ = kv_ref.shape
    kv = kv_ref[...]
    index = pl.program_id(1) * size + jnp.arange(size)
    first, end = span[0], span[1]
    each = pl.cdiv(end - first, parts)
    begin = first + pl.program_id(2) * each

    def query(t, acc):
        seen = ((index >= low[t]) & (index < high[t]))[None, :]

        def heads(n, acc):
            row = _load_row(row_ref, (t, pl.ds(n * block, block)))
            p, ds = _score_gradient(plan, row, kv, seen)
            return acc + _key_gradient(p, ds, row)

        return jax.lax.fori_loop(0, row_ref.q.shape[1] // block, heads, acc)

    start = jnp.zeros(kv.shape, jnp.float32)
    out[...] = jax.lax.fori_loop(begin, jnp.minimum(begin + each, end), query, start)


def _key_gradient(p, ds, row):
    """A tile's gradient as key and as value, [keys, width]."""
    as_key = _dot(ds.astype(row.q.dtype), row.q, trans_a=True)
    return as_key + _dot(p.astype(row.q.dtype), row.do, trans_a=True)


def _chosen_gradient(plan, tile, interpret, row, chosen_BTK, entries):
    """The gradient of entries that queries choose, float32 [B,C,width], in chunks of queries."""
    batch, length, choices = chosen_BTK.shape
    width = entries.shape[2]
    bytes_each = batch * choices * width * entries.dtype.itemsize
    chunk = max(1, min(length, PARTS_BYTES // bytes_each))
    padding = -length % chunk
    chosen = jnp.pad(chosen_BTK, ((0, 0), (0, padding), (0, 0)), constant_values=-1)
    row = jax.tree.map(functools.partial(query_blocks.pad, after=padding), row)

    def body(total, index):
        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1)

        own = take(chosen)
        parts = _chosen_parts(plan, tile, interpret, jax.tree.map(take, row), own, entries)
        return total + _add_parts(own, parts, entries.shape[1], interpret), None

    total = jnp.zeros(entries.shape, jnp.float32)
    return jax.lax.scan(body, total, jnp.arange((length + padding) // chunk))[0]


def _chosen_parts(plan, tile, interpret, row, chosen_BTK, entries):
    """What each choice of each query adds to its entry's gradient, [B,T,K,width]."""
    batch, length, _, width = row.q.shape
    choices = chosen_BTK.shape[2]

    def own(x):
        """A query's own."""
        zeros = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, t, j: (b, t, *zeros))

    return pl.pallas_call(
        functools.partial(_parts_kernel, plan, tile.heads),
        out_shape=jax.ShapeDtypeStruct((batch, length, choices, width), entries.dtype),
        grid=(batch, length, choices // tile.keys),
        in_specs=[
            pl.BlockSpec((None, None, tile.keys), lambda b, t, j: (b, t, j)),
            pl.BlockSpec((None, *entries.shape[1:]), lambda b, t, j: (b, 0, 0)),
            jax.tree.map(own, row),
        ],
        out_specs=pl.BlockSpec((None, None, tile.keys, width), lambda b, t, j: (b, t, j, 0)),
        compiler_params=_parameters(tile),
        name="sparse_attention_choice_gradient",
        interpret=interpret,
    )(chosen_BTK, entries, row)


def _parts_kernel(plan, block, chosen, entries, row_ref, out):
    index = chosen[...]
    seen = index >= 0
    (kv,) = _load_rows(entries, index, seen)

    def heads(n, acc):
        row = _load_row(row_ref, pl.ds(n * block, block))
        p, ds = _score_gradient(plan, row, kv, seen[None, :])
        return acc + _key_gradient(p, ds, row)

    acc = jnp.zeros(kv.shape, jnp.float32)
    out[...] = jax.lax.fori_loop(0, row_ref.q.shape[0] // block, heads, acc).astype(out.dtype)


def _add_parts(chosen_BTK, parts_BTKH, entries, interpret):
    """The parts of every entry added in the order of the queries, float32 [B, entries, width]."""
    batch, length, choices, width = parts_BTKH.shape
    choice = jnp.where(chosen_BTK < 0, entries, chosen_BTK).reshape(batch, -1)
    order = jnp.argsort(choice, axis=1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(choice, order, axis=1)
    edges = jnp.arange(entries + 1, dtype=jnp.int32)
    edges = jax.vmap(jnp.searchsorted, in_axes=(0, None))(ordered, edges).astype(jnp.int32)
    span = jnp.stack([edges[:, :-1], edges[:, 1:]], axis=-1)
    return pl.pallas_call(
        _sum_kernel,
        out_shape=jax.ShapeDtypeStruct((batch, entries, width), jnp.float32),
        grid=(batch, entries),
        in_specs=[
            pl.BlockSpec((None, None, 2), lambda b, e: (b, e, 0)),
            pl.BlockSpec((None, order.shape[1]), lambda b, e: (b, 0)),
            pl.BlockSpec((None, length * choices, width), lambda b, e: (b, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, width), lambda b, e: (b, e, 0)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        name="sparse_attention_add_parts",
        interpret=interpret,
    )(span, order, parts_BTKH.reshape(batch, length * choices, width))


def _sum_kernel(span, order, parts, out):
    def body(j, acc):
        return acc + parts[order[j]].astype(jnp.float32)

    out[...] = jax.lax.fori_loop(span[0], span[1], body, jnp.zeros(out.shape, jnp.float32))
