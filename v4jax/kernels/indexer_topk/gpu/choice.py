"""The indexer's choice on a GPU (Pallas Triton): three kernels over a chunk of queries.

A row of 262,144 scores does not fit shared memory, so a chunk's scores go through a workspace whose
size does not grow with T. (a) `order` scores a tile of keys against a group of queries, each key
tile in registers or shared memory once. (b) `gather` bounds the threshold by the maxima of
interleaved groups of entries and copies the few candidates above the bound. (c) `select` finds the
threshold among the candidates and writes the packed mask.
"""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels import blocks, membership
from v4jax.kernels.indexer_topk.gpu import tiles as gpu_tiles
from v4jax.kernels.indexer_topk.stored_keys import StoredKeys

INVISIBLE = -(2**31)
GROUP = membership.GROUP
# Elements of the workspace, 4 bytes each.
WORKSPACE = 64 << 20
# Candidates of a row; more (rows of mostly equal scores) are counted in the workspace instead.
CANDIDATES = 8192
# Past the candidates, where masked-off elements of a scatter point.
SPARE = 128
_ABOVE_ALL = 0x7F800001


# What the kernels read and write, by name: arrays outside, their blocks, or references.


class Queries(NamedTuple):
    """A chunk of queries, and the entries [low, high) that each has to score."""

    q: Any
    weight: Any
    low: Any
    high: Any


class Range(NamedTuple):
    """The entries [low, high) that each query sees."""

    low: Any
    high: Any


class Candidates(NamedTuple):
    """The few entries of a query among which its threshold lies.

    Attributes:
      order: their scores as integers, the first `found` of the row.
      found: how many reach `below`; more than fit are not all in the row.
      below, above: bounds of the threshold.
    """

    order: Any
    found: Any
    below: Any
    above: Any


def indexer_member(
    q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, *, topk: int, native: bool, interpret: bool
):
    """See api.indexer_member."""
    sizes = blocks.blocks("cuda").indexer_topk
    args = (q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT)
    return _member(*args, topk=topk, native=native, sizes=sizes, interpret=interpret)


def refuse(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT) -> str | None:
    """Why this implementation cannot take the arguments."""
    batch, entries = keys_BCZ.shape[:2]
    if batch > 65535:
        return f"B is {batch}; supported are at most 65535 sequences"
    width = _width(entries)
    if batch * (width + _candidates(width)) > 2 * WORKSPACE:
        return f"B x C is {batch} x {entries}; the workspace holds {2 * WORKSPACE} scores"
    return gpu_tiles.refuse(q_BTIZ, keys_BCZ)


def _width(entries):
    return membership.words(entries) * membership.BITS


def _candidates(width):
    return min(CANDIDATES, 1 << (width - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("topk", "native", "sizes", "interpret"))
def _member(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, *, topk, native, sizes, interpret):
    batch, length = low_BT.shape
    entries = keys_BCZ.shape[1]
    q, weight, keys = gpu_tiles.prepared(q_BTIZ, weight_BTI, keys_BCZ)
    high_BT = jnp.minimum(high_BT, entries)
    chunk, group = _chunks(batch, length, _width(entries), sizes)
    chunks = -(-length // chunk)

    heads = q_BTIZ.shape[2]

    def one(args):
        return _choose(*args, keys, group, heads, topk, native, sizes, interpret)

    args = (q, weight, low_BT, high_BT)
    args = tuple(gpu_tiles.pad_to(x, 1, chunks * chunk) for x in args)
    if chunks == 1:
        word = one(args)
    else:
        split = (einops.rearrange(x, "b (n q) ... -> n b q ...", q=chunk) for x in args)
        word = einops.rearrange(lax.map(one, tuple(split)), "n b q w -> b (n q) w")
    return lax.bitcast_convert_type(word[:, :length], jnp.uint32)


def _chunks(batch, length, width, sizes):
    """Queries of a chunk, whose scores and candidates fit the workspace, and of a program."""
    fit = max(1, WORKSPACE // (batch * (width + _candidates(width))))
    group = min(sizes.queries, 1 << (length - 1).bit_length(), 1 << (fit.bit_length() - 1))
    most = fit // group * group
    chunks = -(-length // most)
    return gpu_tiles.round_up(-(-length // chunks), group), group


def _choose(q, weight, low, high, keys, group, heads, topk, native, sizes, interpret):
    """One chunk's packed mask, int32 [B, chunk, W]."""
    batch, chunk, padded_heads, channels = q.shape
    entries = keys.shape[1]
    width = _width(entries)
    tile = sizes.keys if q.dtype == jnp.bfloat16 else min(sizes.keys, gpu_tiles.FLOAT32_KEYS)
    # A query which sees at most topk entries takes them without scoring.
    choosing = high - low > topk
    seen = Range(low, high)
    scored = Queries(q, weight, jnp.where(choosing, low, entries), jnp.where(choosing, high, 0))

    def call(kernel, grid, specs, outs, out_specs, name, warps):
        return pl.pallas_call(
            kernel,
            out_shape=outs,
            grid=grid,
            in_specs=specs,
            out_specs=out_specs,
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=sizes.stages),
            name=name,
            interpret=interpret,
        )

    def whole(*shape):
        return pl.BlockSpec((None, *shape), lambda *ids: (ids[-1], *(0 for _ in shape)))

    row = whole(chunk)
    order = call(
        functools.partial(
            _order_kernel,
            group=group,
            tile=tile,
            rows=entries,
            heads=heads,
            native=native,
            interpret=interpret,
        ),
        (chunk // group, -(-entries // tile), batch),
        [
            Queries(whole(chunk, padded_heads, channels), whole(chunk, padded_heads), row, row),
            jax.tree.map(lambda x: whole(*x.shape[1:]), keys),
        ],
        jax.ShapeDtypeStruct((batch, chunk, width), jnp.int32),
        whole(chunk, width),
        "indexer_order",
        sizes.warps,
    )(scored, keys)
    count = _candidates(width)
    held = Candidates(whole(chunk, count + SPARE), row, row, row)
    [candidates] = call(
        functools.partial(_gather_kernel, topk=topk, count=count),
        (chunk, batch),
        [whole(chunk, width), Range(row, row)],
        (
            Candidates(
                jax.ShapeDtypeStruct((batch, chunk, count + SPARE), jnp.int32),
                *[jax.ShapeDtypeStruct((batch, chunk), jnp.int32)] * 3,
            ),
        ),
        (held,),
        "indexer_gather",
        8,
    )(order, seen)
    return call(
        functools.partial(_select_kernel, topk=topk, count=count),
        (chunk, batch),
        [whole(chunk, width), held, Range(row, row)],
        jax.ShapeDtypeStruct((batch, chunk, width // membership.BITS), jnp.int32),
        whole(chunk, width // membership.BITS),
        "indexer_select",
        8,
    )(order, candidates, seen)


def _order_kernel(queries, keys_ref, order_ref, *, group, tile, rows, heads, native, interpret):
    """Scores of a key tile and a group of queries as integers of the same order."""
    first, start = pl.program_id(0) * group, pl.program_id(1) * tile
    own = pl.ds(first, group)
    low, high = jnp.min(queries.low[own]), jnp.max(queries.high[own])

    @pl.when((start < high) & (start + tile > low))
    def _():
        if isinstance(keys_ref, StoredKeys):
            keys = gpu_tiles.load_stored(keys_ref, start, tile, rows, queries.q.dtype)
        else:
            keys = gpu_tiles.load_rows(keys_ref, start, tile, rows)

        def body(index, carry):
            t = first + index
            q, weight = queries.q[t], queries.weight[t]
            scores = gpu_tiles.scores(keys, q, weight, heads, native, interpret)
            order_ref[t, pl.ds(start, tile)] = _order_preserving(scores)
            return carry

        lax.fori_loop(0, group, body, 0)


def _order_preserving(scores):
    """float32 -> int32 of the same order, -0 as 0, NaN as -inf, all above INVISIBLE."""
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(scores != scores, -jnp.inf, scores)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _load_group(order_ref, t, group, low, high):
    """GROUP entries of a row and which are visible, as (order, visible).

    A masked load would be one element at a time; what lies outside is loaded and dropped.
    """
    position = group * GROUP + lax.broadcasted_iota(jnp.int32, (GROUP,), 0)
    visible = (position >= low) & (position < high)
    order = order_ref[t, pl.ds(group * GROUP, GROUP)]
    return jnp.where(visible, order, INVISIBLE), visible


def _middle(low, high):
    """Halfway, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def _bisect(at_least, below, above, reached, topk):
    """The largest value that at least topk elements reach, and how many do.

    `below` is reached by `reached` elements, topk or more; `above` by fewer. Stops where exactly
    topk elements reach it.
    """

    def unfinished(state):
        below, above, reached = state
        return (_middle(below, above) > below) & (reached != topk)

    def step(state):
        below, above, reached = state
        middle = _middle(below, above)
        count = at_least(middle)
        enough = count >= topk
        return (
            jnp.where(enough, middle, below),
            jnp.where(enough, above, middle),
            jnp.where(enough, count, reached),
        )

    below, _, reached = lax.while_loop(unfinished, step, (below, above, reached))
    return below, reached


def _total(mask):
    return jnp.sum(mask.astype(jnp.int32))


def _gather_kernel(order_ref, seen, candidates, *, topk, count):
    """A row's entries that reach a lower bound of its threshold, in the order of the entries.

    The topk-th largest of the maxima of GROUP interleaved groups of entries is such a bound: topk
    groups reach it, so topk entries do. Of scores in random order little more than topk reach it.
    """
    t = pl.program_id(0)
    low, high = seen.low[t], seen.high[t]
    bounded = (high - low > count) & (topk <= GROUP)
    first = low // GROUP
    last = jnp.where(high - low > topk, (high + GROUP - 1) // GROUP, first)
    largest = lax.fori_loop(
        first,
        jnp.where(bounded, last, first),
        lambda group, best: jnp.maximum(best, _load_group(order_ref, t, group, low, high)[0]),
        jnp.full((GROUP,), INVISIBLE, jnp.int32),
    )
    above = jnp.where(bounded, jnp.max(largest), _ABOVE_ALL - 1) + 1
    below, _ = _bisect(
        lambda value: _total(largest >= value),
        jnp.int32(INVISIBLE),
        jnp.where(bounded, above, INVISIBLE + 1),
        jnp.int32(GROUP),
        topk,
    )
    below = jnp.maximum(below, INVISIBLE + 1)

    def body(group, found):
        order, _ = _load_group(order_ref, t, group, low, high)
        mask = order >= below
        rank = jnp.cumsum(mask.astype(jnp.int32))
        slot = found + rank - 1
        kept = mask & (slot < count)
        plt.store(candidates.order.at[t, jnp.where(kept, slot, count)], order, mask=kept)
        return found + _total(mask)

    candidates.found[t] = lax.fori_loop(first, last, body, jnp.int32(0))
    candidates.below[t], candidates.above[t] = below, above


def _select_kernel(order_ref, candidates, seen, word_ref, *, topk, count):
    """A row's threshold among its candidates, and its packed mask."""
    t = pl.program_id(0)
    low, high, found = seen.low[t], seen.high[t], candidates.found[t]
    choosing = high - low > topk
    groups = word_ref.shape[1] // membership.LANES
    first, last = low // GROUP, (high + GROUP - 1) // GROUP
    slot = lax.broadcasted_iota(jnp.int32, (count,), 0)
    held = jnp.where(slot < found, candidates.order[t, pl.ds(0, count)], INVISIBLE)

    def in_row(value):
        def body(group, total):
            order, _ = _load_group(order_ref, t, group, low, high)
            return total + _total(order >= value)

        return lax.fori_loop(first, last, body, jnp.int32(0))

    def at_least(value):
        return lax.cond(found <= count, lambda: _total(held >= value), lambda: in_row(value))

    lowest = jnp.int32(INVISIBLE)
    threshold, reached = _bisect(
        at_least,
        jnp.where(choosing, candidates.below[t], lowest),
        jnp.where(choosing, candidates.above[t], lowest + 1),
        jnp.where(choosing, found, topk),
        topk,
    )
    # Where more reach the threshold than wanted, so many of the equals are taken, the first ones.
    tied = choosing & (reached > topk)
    wanted = jnp.where(tied, topk - at_least(threshold + 1), groups * GROUP)

    def empty(group, carry):
        word_ref[t, pl.ds(group * membership.LANES, membership.LANES)] = jnp.zeros(
            (membership.LANES,), jnp.int32
        )
        return carry

    def write(group, equals):
        order, visible = _load_group(order_ref, t, group, low, high)
        # Unscored rows hold anything; they take all that is visible.
        order = jnp.where(choosing, order, INVISIBLE)
        equal = visible & (order == threshold)
        rank = equals + jnp.cumsum(equal.astype(jnp.int32))
        chosen = (visible & (order > threshold)) | (equal & (rank <= wanted))
        bit = lax.broadcasted_iota(jnp.int32, (GROUP,), 0) // membership.LANES
        word = jnp.where(chosen, jnp.left_shift(jnp.ones_like(bit), bit), 0)
        # No bit is set twice, so adding them is joining them.
        word = jnp.sum(word.reshape(membership.BITS, membership.LANES), axis=0)
        word_ref[t, pl.ds(group * membership.LANES, membership.LANES)] = word
        return equals + _total(equal)

    lax.fori_loop(0, first, empty, 0)
    lax.fori_loop(first, last, write, jnp.int32(0))
    lax.fori_loop(jnp.maximum(first, last), groups, empty, 0)
