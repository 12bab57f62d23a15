"""Sparse attention on TPUs: tiles of queries (every head of each) against tiles of keys.

A tile of queries walks over the key tiles that it needs, window first, then entries, in one online
softmax that begins with the sink. Key tiles come from HBM by double-buffered DMA; those that hold
no visible or no chosen entry are not in the walk. The choice is a packed mask
(`kernels.membership`), unpacked 128 entries at a shift. Stored rows (`stored`) come as they are and
are expanded on arrival. The backward pass walks the same tiles
for dq, and for every key tile the tiles of queries that meet it for its gradient: no atomics, the
same bits every time.
"""

import functools

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

    Stored rows have words and tails arrive beside the key tiles.
    """
    _, _, heads, width = q_BTNH.shape
    rows = sizes.queries * -(-heads // 16) * 16
    width = -(-width // 128) * 128
    item = q_BTNH.dtype.itemsize
    tiles = 4 * rows * width * item + 2 * sizes.keys * width * (item + 4)
    if isinstance(entries_BCH, StoredRows):
        tiles += 2 * (sizes.keys + sizes.keys // PLANES) * LANES * 4
    return tiles + 4 * rows * sizes.keys * 4 + rows * width * 4


def forward(plan, q_BTNH, sink_N, window_BSH, entries_BCH, places, *, interpret):
    """See api.sparse_attention: out [B,T,N,H] of q's dtype and log-sum-exp [B,T,N]."""
    sizes = blocks.blocks("tpu").sparse_attention
    arrays = (q_BTNH, sink_N, window_BSH, entries_BCH, places)
    if pallas_tpu_gather.serves(plan, sizes, q_BTNH, entries_BCH):
        return pallas_tpu_gather.forward(plan, sizes, interpret, *arrays)
    arrays = (q_BTNH, sink_N, window_BSH, as_rows(entries_BCH), places)
    return _forward(plan, sizes, interpret, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(plan, sizes, interpret, q_BTNH, sink_N, window_BSH, entries_BCH, places):
    tiles, arrays = prepare(plan, sizes, q_BTNH, window_BSH, entries_BCH, places)
    q, window, entries, bounds, member, walk, _ = arrays
    sink = jnp.pad(sink_N, (0, tiles.heads - sink_N.shape[0]))
    sink = jnp.broadcast_to(sink[:, None], (tiles.heads, 128))
    batch, length, heads, width = q.shape
    sources, buffers = _entry_sources(tiles, entries)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan, tiles),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, tiles.count, tiles.lanes, 128), jnp.float32),
        ),
        grid=(batch, tiles.count),
        in_specs=[
            *_query_specs(tiles, walk, bounds, member),
            _rows_spec(tiles),
            pl.BlockSpec((heads, 128), lambda b, i: (0, 0)),
            *[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(sources)),
        ],
        out_specs=(_rows_spec(tiles), _lanes_spec(tiles)),
        scratch_shapes=[
            pltpu.VMEM((tiles.rows, width), jnp.float32),
            pltpu.VMEM((2, tiles.keys, width), window.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            *buffers,
        ],
        compiler_params=_parameters(),
        name="sparse_attention_forward",
        interpret=interpret,
    )(walk, bounds, member, q, sink, window, *sources)
    return unprepare(tiles, q_BTNH, out), tiles.from_lanes(lse, q_BTNH)


def _entry_sources(tiles, entries):
    """The arrays that hold the entries, and where stored ones arrive."""
    if not isinstance(entries, StoredRows):
        return (entries,), ()
    shapes = ((2, tiles.keys, LANES), (2, tiles.keys // PLANES, LANES))
    return (entries.words, entries.tails), [pltpu.VMEM(shape, jnp.int32) for shape in shapes]


def _parameters():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


def _query_specs(tiles, walk, bounds, member):
    """The walk, the bounds and the mask of one tile of queries."""
    return [
        pl.BlockSpec((1, 1, 1, walk.shape[-1]), lambda b, i: (b, i, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((1, tiles.queries, bounds.shape[-1]), lambda b, i: (b, i, 0)),
        pl.BlockSpec((1, tiles.queries, member.shape[-1]), lambda b, i: (b, i, 0)),
    ]


def _rows_spec(tiles):
    shape = (1, tiles.queries, tiles.heads, tiles.width)
    return pl.BlockSpec(shape, lambda b, i: (b, i, 0, 0))


def _lanes_spec(tiles):
    return pl.BlockSpec((1, 1, tiles.lanes, 128), lambda b, i: (b, i, 0, 0))


def _forward_kernel(plan, tiles, walk, bounds, member, q_ref, sink, window, *refs):
    """refs: the sources of entries, out, log-sum-exp, sums, and what `_walk_keys` needs."""
    count = 2 if len(refs) > 6 else 1
    entries, (o_ref, lse_ref, acc) = refs[:count], refs[count : count + 3]
    scratch = refs[count + 3 :]
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
    top, total = _walk_keys(
        plan, tiles, walk, bounds, member, window, entries, scratch, attend_tile, carry
    )
    o_ref[0] = (acc[...] / total).reshape(o_ref.shape[1:]).astype(o_ref.dtype)
    lse_ref[0, 0] = _to_lanes(top + jnp.log(total), tiles.lanes)


def _walk_keys(plan, tiles, walk, bounds, member, window, entries, scratch, attend_tile, carry):
    """`attend_tile(kv, bias, carry)` for every key tile of these queries, DMA one tile ahead.

    walk: [first window tile, their number, first entry tile, number of entry tiles, the next tile
    of each ...] in SMEM. entries: one array, or words and tails of stored rows. scratch: a double
    buffer of rows, two semaphores, and buffers for words and tails.
    """
    batch = pl.program_id(0)
    buf, sem, *stored_bufs = scratch
    arrivals = stored_bufs or [buf]
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
            for source, buffer in zip(sources, buffers, strict=True):
                count = buffer.shape[1]
                rows = source.at[batch, pl.ds(tile * count, count)]
                pltpu.make_async_copy(rows, buffer.at[slot], sem.at[slot]).start()

        pl.when(step < in_window)(lambda: copy([window], [buf]))
        pl.when(step >= in_window)(lambda: copy(entries, arrivals))

    def wait(slot, buffers):
        for buffer in buffers:
            pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], sem.at[slot]).wait()

    def arrive(step, slot):
        if not stored_bufs:
            # Waits for the bytes of one tile, whichever array it came from.
            return wait(slot, [buf])

        @pl.when(step < in_window)
        def _():
            wait(slot, [buf])

        @pl.when(step >= in_window)
        def _():
            wait(slot, stored_bufs)
            words, tails = (buffer[slot] for buffer in stored_bufs)
            buf[slot] = tpu_stored.expand(words, tpu_stored.tails_of_tile(tails), buf.dtype)

    first = jnp.where(in_window > 0, walk[0, 0, 0, 0], walk[0, 0, 0, 2])
    pl.when(total > 0)(lambda: start(0, first, 0))

    def body(step, state):
        tile, carry = state
        slot = jax.lax.rem(step, 2)
        ahead = following(step + 1, tile)
        pl.when(step + 1 < total)(lambda: start(step + 1, ahead, 1 - slot))
        arrive(step, slot)
        bias = _bias(plan, tiles, tile, step < in_window, bounds[0], member)
        return ahead, attend_tile(buf[slot], bias, carry)

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


def backward(plan, q_BTNH, window_BSH, entries_BCH, places, lse, delta, dout, *, interpret):
    """dq, d(window rows) and d(entries), each of its array's dtype (None for an absent one)."""
    sizes = blocks.blocks("tpu").sparse_attention
    arrays = (q_BTNH, window_BSH, entries_BCH, places, lse, delta, dout)
    return _backward(plan, sizes, interpret, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(plan, sizes, interpret, q_BTNH, window_BSH, entries_BCH, places, lse, delta, dout):
    tiles, arrays = prepare(plan, sizes, q_BTNH, window_BSH, entries_BCH, places)
    q, window, entries, bounds, member, walk, meets = arrays
    dout = tiles.pad_queries(dout.astype(q.dtype))
    lse, delta = tiles.to_lanes(lse), tiles.to_lanes(delta)
    batch, width = q.shape[0], tiles.width
    row = (q, dout, lse, delta)
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, plan, tiles),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch, tiles.count),
        in_specs=[
            *_query_specs(tiles, walk, bounds, member),
            _rows_spec(tiles),
            _rows_spec(tiles),
            _lanes_spec(tiles),
            _lanes_spec(tiles),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=_rows_spec(tiles),
        scratch_shapes=[
            pltpu.VMEM((2, tiles.keys, width), window.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((tiles.rows, width), jnp.float32),
        ],
        compiler_params=_parameters(),
        name="sparse_attention_dq",
        interpret=interpret,
    )(walk, bounds, member, *row, window, entries)

    def keys_gradient(rows, meets, is_window):
        call = functools.partial(_dkv, plan, tiles, is_window, interpret)
        return call(rows, meets, row, bounds, member)

    dwindow = dentries = None
    if window_BSH is not None:
        dwindow = tiles.unpad_keys(keys_gradient(window, meets[0], True), window_BSH)
    if entries_BCH is not None:
        dentries = tiles.unpad_keys(keys_gradient(entries, meets[1], False), entries_BCH)
    return unprepare(tiles, q_BTNH, dq), dwindow, dentries


def _score_gradient(plan, q, do, kv, lse, delta, scores):
    """Probabilities and ds = p (do.v - delta) * scale, [rows, keys]."""
    p = jnp.exp(scores - lse)
    dp = dot(do, kv, ((1,), (1,)))
    return p, p * (dp - delta) * plan.scale


def _dq_kernel(
    plan,
    tiles,
    walk,
    bounds,
    member,
    q_ref,
    do_ref,
    lse_ref,
    delta_ref,
    window,
    entries,
    dq_ref,
    buf,
    sem,
    acc,
):
    rows, width = acc.shape
    q, do = (ref[0].reshape(rows, width) for ref in (q_ref, do_ref))
    lse, delta = (_to_column(ref[0, 0], rows) for ref in (lse_ref, delta_ref))
    acc[...] = jnp.zeros_like(acc)

    def attend_tile(kv, bias, carry):
        scores = _masked_scores(plan, tiles, q, kv, bias)
        _, ds = _score_gradient(plan, q, do, kv, lse, delta, scores)
        acc[...] += dot(ds.astype(kv.dtype), kv, ((1,), (0,)))
        return carry

    _walk_keys(plan, tiles, walk, bounds, member, window, [entries], (buf, sem), attend_tile, 0)
    dq_ref[0] = acc[...].reshape(dq_ref.shape[1:]).astype(dq_ref.dtype)


def _dkv(plan, tiles: Tiles, is_window, interpret, keys, meets, row, bounds, member):
    """The gradient of one array of keys: every tile of it meets its tiles of queries."""
    q, _, lse, _ = row
    batch, count, width = keys.shape
    chosen = bool(plan.topk) and not is_window
    shape = (2, tiles.queries, tiles.heads, width)
    lanes = (2, tiles.lanes, 128)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    tile_spec = pl.BlockSpec((1, tiles.keys, width), lambda b, j: (b, j, 0))
    return pl.pallas_call(
        functools.partial(_dkv_kernel, plan, tiles, is_window, chosen),
        out_shape=jax.ShapeDtypeStruct(keys.shape, jnp.float32),
        grid=(batch, count // tiles.keys),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, meets.shape[-1]), lambda b, j: (b, j, 0, 0), memory_space=pltpu.SMEM
            ),
            tile_spec,
            *[anywhere] * 6,
        ],
        out_specs=tile_spec,
        scratch_shapes=[
            pltpu.VMEM(shape, q.dtype),
            pltpu.VMEM(shape, q.dtype),
            pltpu.VMEM(lanes, jnp.float32),
            pltpu.VMEM(lanes, jnp.float32),
            pltpu.VMEM((2, tiles.queries, bounds.shape[-1]), jnp.int32),
            pltpu.VMEM((2, tiles.queries, membership.LANES), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 6)),
        ],
        compiler_params=_parameters(),
        name="sparse_attention_dkv",
        interpret=interpret,
    )(meets, keys, *row, bounds, member)


def _dkv_kernel(plan, tiles, is_window, chosen, meets, kv_ref, *refs):
    """One tile of keys; meets: [first query tile, their number, the next of each ...]."""
    *sources, out, q_buf, do_buf, lse_buf, delta_buf, bounds_buf, member_buf, sem = refs
    batch, tile = pl.program_id(0), pl.program_id(1)
    total = meets[0, 0, 0, 1]
    buffers = (q_buf, do_buf, lse_buf, delta_buf, bounds_buf, member_buf)
    group = tile * tiles.keys // membership.GROUP

    def copies(i, slot):
        rows = pl.ds(i * tiles.queries, tiles.queries)
        words = pl.ds(pl.multiple_of(group * membership.LANES, membership.LANES), membership.LANES)
        places = [(rows,), (rows,), (i,), (i,), (rows,), (rows, words)]
        used = len(places) if chosen else len(places) - 1
        for k in range(used):
            source = sources[k].at[(batch, *places[k])]
            yield pltpu.make_async_copy(source, buffers[k].at[slot], sem.at[slot, k])

    def start(i, slot):
        for copy in copies(i, slot):
            copy.start()

    first = meets[0, 0, 0, 0]
    pl.when(total > 0)(lambda: start(first, 0))
    kv = kv_ref[0]
    out[...] = jnp.zeros_like(out)

    def body(step, i):
        slot = jax.lax.rem(step, 2)
        ahead = meets[0, 0, 0, 2 + i] if chosen else i + 1
        pl.when(step + 1 < total)(lambda: start(ahead, 1 - slot))
        for copy in copies(i, slot):
            copy.wait()
        q, do = (ref[slot].reshape(tiles.rows, tiles.width) for ref in (q_buf, do_buf))
        lse, delta = (_to_column(ref[slot], tiles.rows) for ref in (lse_buf, delta_buf))
        bias = _tile_bias(tiles, tile, is_window, chosen, bounds_buf[slot], member_buf[slot])
        scores = _masked_scores(plan, tiles, q, kv, bias)
        p, ds = _score_gradient(plan, q, do, kv, lse, delta, scores)
        part = dot(ds.astype(q.dtype), q, ((0,), (0,)))
        out[0] += part + dot(p.astype(q.dtype), do, ((0,), (0,)))
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
