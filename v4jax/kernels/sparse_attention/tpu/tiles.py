"""Sparse attention on TPUs: tiles of queries (every head of each) against tiles of keys.

A tile of queries walks over the key tiles that it needs, window first, then entries, in one online
softmax that begins with the sink. Key tiles come from HBM by double-buffered DMA; those that hold
no visible or no chosen entry are not in the walk. The choice is a packed mask
(`kernels.membership`), unpacked 128 entries at a shift. Stored rows (`stored`) come as they are and
are expanded on arrival. The backward pass walks the same tiles for dq, and for the gradient of a
key tile the tiles of queries that see any of it: no atomics, the same bits every time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import blocks, membership
from v4jax.kernels.sparse_attention.entries import as_rows
from v4jax.kernels.sparse_attention.stored import LANES, PLANES, StoredRows
from v4jax.kernels.sparse_attention.tpu import gather as pallas_tpu_gather
from v4jax.kernels.sparse_attention.tpu import stored as tpu_stored
from v4jax.kernels.sparse_attention.tpu.product import dot
from v4jax.kernels.sparse_attention.walk import Tiles, prepare, unprepare

VMEM_LIMIT = 60 << 20
IN_HBM = pl.BlockSpec(memory_space=pl.ANY)


# What a kernel reads and writes, by name. The same tuple holds the arrays outside, their blocks,
# and inside a kernel the references.


class Seen(NamedTuple):
    """What a tile of queries sees: its walk over key tiles, each query's bounds, its choice."""

    walk: Any
    bounds: Any
    member: Any


class Keys(NamedTuple):
    """All keys, in HBM: window rows, and entries as rows or `StoredRows`."""

    window: Any
    entries: Any


class Arrivals(NamedTuple):
    """Double buffers where key tiles arrive, as rows or (None: never) as stored words."""

    rows: Any
    sem: Any
    stored: StoredRows | None


class Row(NamedTuple):
    """A query and what its gradient takes: log-sum-exp, and delta = do.o."""

    q: Any
    do: Any
    lse: Any
    delta: Any


class SeenRow(NamedTuple):
    """A query as a tile of keys takes it: `Row`, and what the query sees."""

    q: Any
    do: Any
    lse: Any
    delta: Any
    bounds: Any
    member: Any


def refuse(plan, q_BTNH, window_BSH, entries_BCH):
    """Why the kernel cannot take these arguments, or None."""
    sizes = blocks.blocks("tpu").sparse_attention
    for name, x in (("q", q_BTNH), ("window", window_BSH), ("entries", entries_BCH)):
        if x is None or isinstance(x, StoredRows):
            continue
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}; supported: float32, bfloat16"
    if sizes.keys % membership.LANES or membership.GROUP % sizes.keys:
        return f"block of {sizes.keys} keys; supported: multiples of 128 that divide 4096"
    needed, have = _vmem_bytes(sizes, q_BTNH, entries_BCH), blocks.MEMORY[blocks.chip("tpu")]
    if needed > have:
        return (
            f"tiles of {sizes.queries} queries x {sizes.keys} keys need {needed} bytes of VMEM "
            f"and there are {have}; choose smaller ones"
        )
    return None


def _vmem_bytes(sizes, q_BTNH, entries_BCH):
    """The backward pass's buffers: q and do twice, key tiles, four score tiles, accumulators.

    With stored rows, words and tails arrive as well as key tiles.
    """
    _, _, heads, width = q_BTNH.shape
    rows = sizes.queries * -(-heads // 16) * 16
    width = -(-width // 128) * 128
    item = q_BTNH.dtype.itemsize
    tiles = 4 * rows * width * item + 2 * sizes.keys * width * (item + 4)
    if isinstance(entries_BCH, StoredRows):
        tiles += 2 * (sizes.keys + sizes.keys // PLANES) * LANES * 4
    return tiles + 4 * rows * sizes.keys * 4 + rows * width * 4


def forward(plan, q_BTNH, sink_N, window_BSH, entries_BCH, visible, *, interpret):
    """See api.sparse_attention: out [B,T,N,H] of q's dtype and log-sum-exp [B,T,N]."""
    sizes = blocks.blocks("tpu").sparse_attention
    arrays = (q_BTNH, sink_N, window_BSH, entries_BCH, visible)
    if pallas_tpu_gather.serves(plan, sizes, q_BTNH, entries_BCH):
        return pallas_tpu_gather.forward(plan, sizes, interpret, *arrays)
    arrays = (q_BTNH, sink_N, window_BSH, as_rows(entries_BCH), visible)
    return _forward(plan, sizes, interpret, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(plan, sizes, interpret, q_BTNH, sink_N, window_BSH, entries_BCH, visible):
    tiles, given = prepare(plan, sizes, q_BTNH, window_BSH, entries_BCH, visible)
    seen = Seen(given.walk, given.bounds, given.member)
    keys = Keys(given.window, given.entries)
    sink = jnp.pad(sink_N, (0, tiles.heads - sink_N.shape[0]))
    sink = jnp.broadcast_to(sink[:, None], (tiles.heads, 128))
    batch, length, heads, width = given.q.shape
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan, tiles),
        out_shape=(
            jax.ShapeDtypeStruct(given.q.shape, given.q.dtype),
            jax.ShapeDtypeStruct((batch, tiles.count, tiles.lanes, 128), jnp.float32),
        ),
        grid=(batch, tiles.count),
        in_specs=[
            _seen_spec(tiles, seen),
            _rows_spec(tiles),
            pl.BlockSpec((heads, 128), lambda b, i: (0, 0)),
            jax.tree.map(lambda _: IN_HBM, keys),
        ],
        out_specs=(_rows_spec(tiles), _lanes_spec(tiles)),
        scratch_shapes=[pltpu.VMEM((tiles.rows, width), jnp.float32), _arrivals(tiles, keys)],
        compiler_params=_parameters(),
        name="sparse_attention_forward",
        interpret=interpret,
    )(seen, given.q, sink, keys)
    return unprepare(tiles, q_BTNH, out), tiles.from_lanes(lse, q_BTNH)


def _arrivals(tiles, keys):
    """The buffers and semaphores of `_walk_keys`."""
    stored = None
    if isinstance(keys.entries, StoredRows):
        stored = StoredRows(
            words=pltpu.VMEM((2, tiles.keys, LANES), jnp.int32),
            tails=pltpu.VMEM((2, tiles.keys // PLANES, LANES), jnp.int32),
        )
    rows = pltpu.VMEM((2, tiles.keys, tiles.width), keys.window.dtype)
    return Arrivals(rows, pltpu.SemaphoreType.DMA((2,)), stored)


def _parameters():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


def _seen_spec(tiles, seen):
    """One tile of queries' own."""
    steps, bounds, words = (x.shape[-1] for x in seen)
    return Seen(
        walk=pl.BlockSpec((1, 1, 1, steps), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM),
        bounds=pl.BlockSpec((1, tiles.queries, bounds), lambda b, i: (b, i, 0)),
        member=pl.BlockSpec((1, tiles.queries, words), lambda b, i: (b, i, 0)),
    )


def _rows_spec(tiles):
    shape = (1, tiles.queries, tiles.heads, tiles.width)
    return pl.BlockSpec(shape, lambda b, i: (b, i, 0, 0))


def _lanes_spec(tiles):
    return pl.BlockSpec((1, 1, tiles.lanes, 128), lambda b, i: (b, i, 0, 0))


def _forward_kernel(plan, tiles, seen, q_ref, sink, keys, o_ref, lse_ref, acc, arrivals):
    rows, width = acc.shape
    q = q_ref[0].reshape(rows, width)
    top = jnp.broadcast_to(sink[:, :1][None], (tiles.queries, tiles.heads, 1)).reshape(rows, 1)
    acc[...] = jnp.zeros_like(acc)

    def attend_tile(kv, bias, carry):
        top, total = carry
        scores = _masked_scores(plan, tiles, q, kv, bias)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        shrink = jnp.exp(top - new_top)
        p = jnp.exp(scores - new_top)
        acc[...] = acc[...] * shrink + dot(p.astype(kv.dtype), kv, ((1,), (0,)))
        return new_top, total * shrink + p.sum(-1, keepdims=True)

    carry = (top, jnp.ones((rows, 1), jnp.float32))
    top, total = _walk_keys(plan, tiles, seen, keys, arrivals, attend_tile, carry)
    o_ref[0] = (acc[...] / total).reshape(o_ref.shape[1:]).astype(o_ref.dtype)
    lse_ref[0, 0] = _to_lanes(top + jnp.log(total), tiles.lanes)


def _walk_keys(plan, tiles, seen, keys, arrivals, attend_tile, carry):
    """`attend_tile(kv, bias, carry)` for every key tile of these queries, DMA one tile ahead.

    seen.walk: [first window tile, their number, first entry tile, number of entry tiles, the next
    tile of each ...] in SMEM.
    """
    batch = pl.program_id(0)
    walk, sem = seen.walk, arrivals.sem
    is_stored = arrivals.stored is not None
    in_window = walk[0, 0, 0, 1]
    total = in_window + walk[0, 0, 0, 3]

    def following(step, tile):
        """The tile of `step`, behind the `tile` of the step before."""
        ahead = tile + 1
        if plan.topk:
            at_entries = jnp.where(step > in_window, tile, 0)
            ahead = jnp.where(step > in_window, walk[0, 0, 0, 4 + at_entries], ahead)
        return jnp.where(step == in_window, walk[0, 0, 0, 2], ahead)

    def start(step, tile, slot):
        def copy(sources, buffers):
            for source, buffer in zip(*map(jax.tree.leaves, (sources, buffers)), strict=True):
                count = buffer.shape[1]
                rows = source.at[batch, pl.ds(tile * count, count)]
                pltpu.make_async_copy(rows, buffer.at[slot], sem.at[slot]).start()

        to = arrivals.stored if is_stored else arrivals.rows
        pl.when(step < in_window)(lambda: copy(keys.window, arrivals.rows))
        pl.when(step >= in_window)(lambda: copy(keys.entries, to))

    def wait(slot, buffers):
        for buffer in jax.tree.leaves(buffers):
            pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], sem.at[slot]).wait()

    def arrive(step, slot):
        if not is_stored:
            # Waits for the bytes of one tile, whichever array it came from.
            return wait(slot, arrivals.rows)

        @pl.when(step < in_window)
        def _():
            wait(slot, arrivals.rows)

        @pl.when(step >= in_window)
        def _():
            wait(slot, arrivals.stored)
            words, tails = arrivals.stored.words[slot], arrivals.stored.tails[slot]
            rows = tpu_stored.expand(words, tpu_stored.tails_of_tile(tails), arrivals.rows.dtype)
            arrivals.rows[slot] = rows

    first = jnp.where(in_window > 0, walk[0, 0, 0, 0], walk[0, 0, 0, 2])
    pl.when(total > 0)(lambda: start(0, first, 0))

    def body(step, state):
        tile, carry = state
        slot = jax.lax.rem(step, 2)
        ahead = following(step + 1, tile)
        pl.when(step + 1 < total)(lambda: start(step + 1, ahead, 1 - slot))
        arrive(step, slot)
        bias = _bias(plan, tiles, tile, step < in_window, seen.bounds[0], seen.member)
        return ahead, attend_tile(arrivals.rows[slot], bias, carry)

    return jax.lax.fori_loop(0, total, body, (first, carry))[1]


def _bias(plan, tiles, tile, is_window, bounds_QX, member):
    """0 where a query sees a key of the tile and -inf where not, [Q, keys].

    member: the ref of the mask (1, Q, words).
    """
    column = tile * tiles.keys + jax.lax.broadcasted_iota(jnp.int32, (tiles.queries, tiles.keys), 1)
    low = jnp.where(is_window, bounds_QX[:, 0:1], bounds_QX[:, 2:3])
    high = jnp.where(is_window, bounds_QX[:, 1:2], bounds_QX[:, 3:4])
    seen = (column >= low) & (column < high)
    if plan.topk:
        group = jnp.where(is_window, 0, tile * tiles.keys // membership.GROUP)
        begin = pl.multiple_of(group * membership.LANES, membership.LANES)
        words = member[0, :, pl.ds(begin, membership.LANES)]
        seen &= (_bits(tiles, tile, words) == 1) | jnp.broadcast_to(is_window, seen.shape)
    return jnp.where(seen, 0.0, -jnp.inf)


def _bits(tiles, tile, words):
    """The tile's entries of a mask's words [Q,128]: 0 or 1, [Q, keys]."""
    first = tile * tiles.keys % membership.GROUP // membership.LANES
    parts = [(words >> (first + i)) & 1 for i in range(tiles.keys // membership.LANES)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _masked_scores(plan, tiles, q, kv, bias):
    """q.k * scale + bias, every head of a query under the query's mask: [rows, keys]."""
    scores = dot(q, kv, ((1,), (1,))) * plan.scale
    scores = scores.reshape(tiles.queries, tiles.heads, tiles.keys) + bias[:, None]
    return scores.reshape(tiles.rows, tiles.keys)


def _eye():
    shape = (128, 128)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row == jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _to_lanes(column, lanes):
    """A column [rows,1] as [lanes,128]: stored so, it takes no padding in HBM."""
    missing = lanes * 128 - column.shape[0]
    if missing:
        column = jnp.concatenate([column, jnp.zeros((missing, 1), column.dtype)], axis=0)
    parts = [
        jnp.where(_eye(), column[128 * r : 128 * (r + 1)], 0.0).sum(0, keepdims=True)
        for r in range(lanes)
    ]
    return parts[0] if lanes == 1 else jnp.concatenate(parts, axis=0)


def _to_column(x, rows):
    """The inverse of `_to_lanes`."""
    parts = [jnp.where(_eye(), x[r : r + 1], 0.0).sum(1, keepdims=True) for r in range(x.shape[0])]
    column = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
    return column[:rows]


def backward(plan, q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout, *, interpret):
    """dq, d(window rows) and d(entries), each of its array's dtype (None for an absent one)."""
    sizes = blocks.blocks("tpu").sparse_attention
    arrays = (q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout)
    return _backward(plan, sizes, interpret, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(plan, sizes, interpret, q_BTNH, window_BSH, entries_BCH, visible, lse, delta, dout):
    tiles, given = prepare(plan, sizes, q_BTNH, window_BSH, entries_BCH, visible)
    q, seen = given.q, Seen(given.walk, given.bounds, given.member)
    keys = Keys(given.window, given.entries)
    dout = tiles.pad_queries(dout.astype(q.dtype))
    row = Row(q, dout, tiles.to_lanes(lse), tiles.to_lanes(delta))
    rows, lanes = _rows_spec(tiles), _lanes_spec(tiles)
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, plan, tiles),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(q.shape[0], tiles.count),
        in_specs=[
            _seen_spec(tiles, seen),
            Row(q=rows, do=rows, lse=lanes, delta=lanes),
            Keys(window=IN_HBM, entries=IN_HBM),
        ],
        out_specs=rows,
        scratch_shapes=[
            _arrivals(tiles, keys),
            pltpu.VMEM((tiles.rows, tiles.width), jnp.float32),
        ],
        compiler_params=_parameters(),
        name="sparse_attention_dq",
        interpret=interpret,
    )(seen, row, keys)
    seen_row = SeenRow(*row, given.bounds, given.member)
    gradient = functools.partial(_dkv, plan, tiles, interpret, seen_row)
    dwindow = dentries = None
    if window_BSH is not None:
        dwindow = gradient(given.window, given.window_walk, is_window=True)
        dwindow = tiles.unpad_keys(dwindow, window_BSH)
    if entries_BCH is not None:
        dentries = gradient(given.entries, given.entries_walk, is_window=False)
        dentries = tiles.unpad_keys(dentries, entries_BCH)
    return unprepare(tiles, q_BTNH, dq), dwindow, dentries


def _score_gradient(plan, row: Row, kv, scores):
    """Probabilities and ds = p (do.v - delta) * scale, [rows, keys]."""
    p = jnp.exp(scores - row.lse)
    dp = dot(row.do, kv, ((1,), (1,)))
    return p, p * (dp - row.delta) * plan.scale


def _load_row(tiles, ref: Row | SeenRow, heads_at, lanes_at):
    """The heads of a tile of queries as matrices [rows, width] and columns [rows, 1]."""
    q, do = (x[heads_at].reshape(tiles.rows, tiles.width) for x in (ref.q, ref.do))
    lse, delta = (_to_column(x[lanes_at], tiles.rows) for x in (ref.lse, ref.delta))
    return Row(q, do, lse, delta)


def _dq_kernel(plan, tiles, seen, row_ref, keys, dq_ref, arrivals, acc):
    row = _load_row(tiles, row_ref, 0, (0, 0))
    acc[...] = jnp.zeros_like(acc)

    def attend_tile(kv, bias, carry):
        scores = _masked_scores(plan, tiles, row.q, kv, bias)
        _, ds = _score_gradient(plan, row, kv, scores)
        acc[...] += dot(ds.astype(kv.dtype), kv, ((1,), (0,)))
        return carry

    _walk_keys(plan, tiles, seen, keys, arrivals, attend_tile, 0)
    dq_ref[0] = acc[...].reshape(dq_ref.shape[1:]).astype(dq_ref.dtype)


def _dkv(plan, tiles: Tiles, interpret, row: SeenRow, keys, walk, is_window):
    """The gradient of one array of keys: for each tile of it a walk over tiles of queries."""
    batch, count, width = keys.shape
    chosen = bool(plan.topk) and not is_window
    heads = pltpu.VMEM((2, tiles.queries, tiles.heads, width), row.q.dtype)
    lanes = pltpu.VMEM((2, tiles.lanes, 128), jnp.float32)
    bounds = pltpu.VMEM((2, tiles.queries, row.bounds.shape[-1]), jnp.int32)
    member = pltpu.VMEM((2, tiles.queries, membership.LANES), jnp.int32)
    steps = (1, 1, 1, walk.shape[-1])
    tile_spec = pl.BlockSpec((1, tiles.keys, width), lambda b, j: (b, j, 0))
    return pl.pallas_call(
        functools.partial(_dkv_kernel, plan, tiles, is_window, chosen),
        out_shape=jax.ShapeDtypeStruct(keys.shape, jnp.float32),
        grid=(batch, count // tiles.keys),
        in_specs=[
            pl.BlockSpec(steps, lambda b, j: (b, j, 0, 0), memory_space=pltpu.SMEM),
            tile_spec,
            SeenRow(*[IN_HBM] * 6),
        ],
        out_specs=tile_spec,
        scratch_shapes=[
            SeenRow(heads, heads, lanes, lanes, bounds, member),
            pltpu.SemaphoreType.DMA((2, 6)),
        ],
        compiler_params=_parameters(),
        name="sparse_attention_dkv",
        interpret=interpret,
    )(walk, keys, row)


def _dkv_kernel(plan, tiles, is_window, chosen, walk, kv_ref, source, out, buffer, sem):
    """One tile of keys.

    walk: [first query tile, their number, the next of each ...]. source: all queries. buffer: a
    double buffer of a tile of them.
    """
    batch, tile = pl.program_id(0), pl.program_id(1)
    total = walk[0, 0, 0, 1]
    group = tile * tiles.keys // membership.GROUP

    def copies(i, slot):
        rows = pl.ds(i * tiles.queries, tiles.queries)
        words = pl.ds(pl.multiple_of(group * membership.LANES, membership.LANES), membership.LANES)
        part = SeenRow((rows,), (rows,), (i,), (i,), (rows,), (rows, words))
        for k, name in enumerate(SeenRow._fields):
            if name == "member" and not chosen:
                continue
            own = getattr(source, name).at[(batch, *getattr(part, name))]
            yield pltpu.make_async_copy(own, getattr(buffer, name).at[slot], sem.at[slot, k])

    def start(i, slot):
        for copy in copies(i, slot):
            copy.start()

    first = walk[0, 0, 0, 0]
    pl.when(total > 0)(lambda: start(first, 0))
    kv = kv_ref[0]
    out[...] = jnp.zeros_like(out)

    def body(step, i):
        slot = jax.lax.rem(step, 2)
        ahead = walk[0, 0, 0, 2 + i] if chosen else i + 1
        pl.when(step + 1 < total)(lambda: start(ahead, 1 - slot))
        for copy in copies(i, slot):
            copy.wait()
        row = _load_row(tiles, buffer, slot, slot)
        bias = _tile_bias(tiles, tile, is_window, chosen, buffer.bounds[slot], buffer.member[slot])
        scores = _masked_scores(plan, tiles, row.q, kv, bias)
        p, ds = _score_gradient(plan, row, kv, scores)
        part = dot(ds.astype(row.q.dtype), row.q, ((0,), (0,)))
        out[0] += part + dot(p.astype(row.q.dtype), row.do, ((0,), (0,)))
        return ahead

    jax.lax.fori_loop(0, total, body, first)


def _tile_bias(tiles, tile, is_window, chosen, bounds_QX, words_QL):
    """`_bias` for a tile whose kind is known."""
    column = tile * tiles.keys + jax.lax.broadcasted_iota(jnp.int32, (tiles.queries, tiles.keys), 1)
    lane = 0 if is_window else 2
    seen = (column >= bounds_QX[:, lane : lane + 1]) & (column < bounds_QX[:, lane + 1 : lane + 2])
    if chosen:
        seen &= _bits(tiles, tile, words_QL) == 1
    return jnp.where(seen, 0.0, -jnp.inf)
