"""The indexer's choice on a TPU: scores streamed into VMEM, a threshold by bisection, bits out.

A program holds the scores of a tile of queries against every entry, as integers of the same order,
and never writes them to HBM. Rows of a tile are head by head, so that summing over heads adds whole
registers. With one or two queries (decode) the entries are folded over the sublanes instead.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import blocks, membership
from v4jax.kernels.indexer_topk.stored_keys import StoredKeys
from v4jax.kernels.indexer_topk.tpu import tiles as tpu_tiles
from v4jax.kernels.indexer_topk.tpu.tiles import LANES, SUBLANES

INVISIBLE = -(2**31)
GROUP = membership.GROUP
# Up to so many queries per sequence, a tile of queries would be mostly padding.
FOLDED_QUERIES = 2
# Scalars per tile: first and past-the-last unit to score, first and past-the-last group to write.
SCALARS = 4
SMEM_TILES = 32768
_COARSE_STEPS = 14


class Queries(NamedTuple):
    """A tile of queries; outside the kernel all of them, or their blocks.

    Attributes:
      q: rows head by head, [I * tile, Z]. weight: their heads' weights.
      bounds: [tile, 2], each query sees entries [x0, x1).
    """

    q: Any
    weight: Any
    bounds: Any


class Scratch(NamedTuple):
    """What a tile of queries keeps in VMEM.

    Attributes:
      order: every entry's score as an integer of the same order, a unit after the other.
      coarse: maxima of interleaved groups of units.
      spread: the weights across lanes, [I * tile, LANES].
    """

    order: Any
    coarse: Any
    spread: Any


def indexer_member(
    q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, *, topk: int, native: bool, interpret: bool
):
    """See api.indexer_member."""
    sizes = blocks.blocks("tpu").indexer_topk
    args = (q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT)
    return _member(*args, topk=topk, native=native, sizes=sizes, interpret=interpret)


def refuse(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT) -> str | None:
    """Why this implementation cannot take the arguments."""
    sizes = blocks.blocks("tpu").indexer_topk
    batch, length, *_ = q_BTIZ.shape
    plan = _Plan(q_BTIZ, keys_BCZ, sizes)
    tiles = batch * -(-length // plan.tile)
    if tiles > SMEM_TILES:
        return f"B x T is {batch} x {length}; at most {SMEM_TILES * plan.tile} queries per call"
    needed, there = plan.bytes(), blocks.MEMORY[blocks.chip("tpu")]
    if needed > there:
        return (
            f"C is {keys_BCZ.shape[1]}: scores of {plan.rows} rows need {needed >> 20} MiB "
            f"of VMEM, and there are {there >> 20} MiB"
        )
    return tpu_tiles.refuse_types(q_BTIZ, keys_BCZ)


class _Plan:
    """How one call is cut.

    A unit is as many entries as are scored at a time: `lanes` of them side by side and, folded,
    eight such rows. `stream` entries per step come from HBM.
    """

    def __init__(self, q_BTIZ, keys_BCZ, sizes):
        _, length, self.heads, _ = q_BTIZ.shape
        self.entries = keys_BCZ.shape[1]
        self.folded = length <= FOLDED_QUERIES
        self.tile = 1 if self.folded else sizes.queries
        self.rows = SUBLANES if self.folded else self.tile
        self.lanes = GROUP // SUBLANES if self.folded else sizes.keys
        self.unit = GROUP if self.folded else self.lanes
        self.groups = membership.words(self.entries) // LANES
        self.units = self.groups * GROUP // self.unit
        self.stream = min(sizes.stream, -(-self.entries // self.unit) * self.unit)
        self.row_bytes = q_BTIZ.dtype.itemsize * LANES
        if isinstance(keys_BCZ, StoredKeys):
            # Codes, and scales in a register of eight rows.
            self.key_bytes = (keys_BCZ.codes.shape[1] + SUBLANES) * 4
        else:
            self.row_bytes = max(self.row_bytes, keys_BCZ.dtype.itemsize * LANES)
            self.key_bytes = self.row_bytes

    def coarse(self, topk):
        """How many units' worth of group maxima bound the threshold; 0 where it would not pay."""
        wanted = -(-2 * topk // (self.rows * self.lanes if self.folded else self.lanes))
        return wanted if self.units >= 8 * wanted else 0

    def bytes(self):
        order = 4 * self.units * self.rows * self.lanes
        keys = 2 * self.stream * self.key_bytes
        queries = 2 * self.heads * self.tile * self.row_bytes
        weights = 4 * self.heads * self.tile * LANES
        out = 2 * 4 * self.rows * self.groups * LANES
        return order + keys + queries + weights + out + (8 << 20)


@functools.partial(jax.jit, static_argnames=("topk", "native", "sizes", "interpret"))
def _member(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, *, topk, native, sizes, interpret):
    batch, length, heads, _ = q_BTIZ.shape
    plan = _Plan(q_BTIZ, keys_BCZ, sizes)
    tile = plan.tile
    q_BTIZ, keys_BCZ = tpu_tiles.pad_channels(q_BTIZ, keys_BCZ)
    low = tpu_tiles.pad_to(low_BT, 1, tile)
    high = tpu_tiles.pad_to(jnp.minimum(high_BT, plan.entries), 1, tile)
    rows = tpu_tiles.by_head(q_BTIZ, tile)
    weight = tpu_tiles.weight_tiles(weight_BTI, tile)
    tiles = rows.shape[1]
    bounds = jnp.stack([low, high], axis=-1).reshape(batch, tiles, tile, 2)
    steps = -(-plan.entries // plan.stream)
    per = plan.stream // plan.unit

    def of_tile(b, t, c, scalars):
        return b, t, 0, 0

    def block(b, t, c, scalars):
        at = SCALARS * (b * tiles + t)
        first, last = scalars[at] // per, jnp.maximum(scalars[at + 1] - 1, 0) // per
        return jnp.clip(c, jnp.minimum(first, last), last)

    queries = Queries(rows, weight, bounds)
    coarse = plan.coarse(topk)
    unit_shape = (plan.rows, plan.lanes)
    word = pl.pallas_call(
        functools.partial(_kernel, plan=plan, topk=topk, native=native, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((batch, tiles, tile, plan.groups * LANES), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, tiles, steps),
            in_specs=[
                jax.tree.map(lambda x: pl.BlockSpec((None, None, *x.shape[2:]), of_tile), queries),
                _streamed(keys_BCZ, plan.stream, block),
            ],
            out_specs=pl.BlockSpec((None, None, tile, plan.groups * LANES), of_tile),
            scratch_shapes=[
                Scratch(
                    order=pltpu.VMEM((plan.units, *unit_shape), jnp.int32),
                    coarse=pltpu.VMEM((max(coarse, 1), *unit_shape), jnp.int32),
                    spread=pltpu.VMEM((heads * tile, LANES), jnp.float32),
                )
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.bytes(),
        ),
        name="indexer_member",
        interpret=interpret,
    )(_scalars(low, high, plan, topk), queries, keys_BCZ)
    word = word.reshape(batch, tiles * tile, -1)[:, :length]
    return lax.bitcast_convert_type(word, jnp.uint32)


def _streamed(keys_BCZ, stream, block):
    """How `stream` keys come, `block(*ids)` being which."""

    def words(x):
        shape = (None, x.shape[1], stream)
        return pl.BlockSpec(shape, lambda b, *ids: (b, 0, block(b, *ids)))

    if isinstance(keys_BCZ, StoredKeys):
        return jax.tree.map(words, keys_BCZ)
    shape = (None, stream, keys_BCZ.shape[2])
    return pl.BlockSpec(shape, lambda b, *ids: (b, block(b, *ids), 0))


def _scalars(low, high, plan, topk):
    """What each tile of queries has to score and to write, SCALARS numbers per tile."""
    # libtpu 0.0.42 dies while it fuses these reductions with what made the bounds.
    low, high = lax.optimization_barrier((low, high))
    some = high > low
    first = jnp.where(some, low, plan.entries).reshape(low.shape[0], -1, plan.tile).min(-1)
    last = jnp.where(some, high, 0).reshape(first.shape + (plan.tile,)).max(-1)
    # A tile whose queries all see at most topk entries takes them without scoring.
    scored = (high - low).reshape(first.shape + (plan.tile,)).max(-1) > topk
    rounded_up = [(last + size - 1) // size for size in (plan.unit, GROUP)]
    parts = [
        jnp.where(scored, first // plan.unit, 0),
        jnp.where(scored, rounded_up[0], 0),
        jnp.where(some.reshape(first.shape + (plan.tile,)).any(-1), first // GROUP, 0),
        rounded_up[1],
    ]
    return jnp.stack(parts, axis=-1).astype(jnp.int32).reshape(-1)


def _kernel(scalars, queries, keys_ref, word_ref, scratch, *, plan, topk, native, interpret):
    order, coarse, spread = scratch
    step, steps = pl.program_id(2), pl.num_programs(2)
    at = SCALARS * (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1))
    first, last = scalars[at], scalars[at + 1]
    low, high = queries.bounds[:, 0:1], queries.bounds[:, 1:2]
    use_coarse = plan.coarse(topk) > 0

    @pl.when((step == 0) & (last > first))
    def _():
        tpu_tiles.spread_weights(queries.weight, spread)
        if use_coarse:
            coarse[...] = jnp.full(coarse.shape, INVISIBLE, jnp.int32)

    def score_row(unit, row):
        """Of `lanes` entries, [tile, LANES] at a time."""
        entry = unit * plan.unit + row * plan.lanes
        start = pl.multiple_of(entry - step * plan.stream, plan.lanes)
        for offset, scores in tpu_tiles.scores(
            queries.q, keys_ref, spread, start, plan.lanes, plan.tile, native, interpret
        ):
            position = entry + offset + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            visible = (position >= low) & (position < high)
            yield jnp.where(visible, _order_preserving(scores, native), INVISIBLE)

    def fold(unit):
        """The same of a folded unit: Mosaic stores no single row at a dynamic place."""
        shape = (plan.rows, LANES)
        sublane = lax.broadcasted_iota(jnp.int32, shape, 0)

        def add(row, parts):
            new = score_row(unit, row)
            return tuple(
                jnp.where(sublane == row, jnp.broadcast_to(key, shape), part)
                for key, part in zip(new, parts, strict=True)
            )

        start = (jnp.zeros(shape, jnp.int32),) * (plan.lanes // LANES)
        return lax.fori_loop(0, plan.rows, add, start)

    def score(unit, carry):
        for part, key in enumerate(fold(unit) if plan.folded else score_row(unit, 0)):
            order[unit, :, part * LANES : (part + 1) * LANES] = key
        if use_coarse:
            slot = lax.rem(unit, coarse.shape[0])
            coarse[slot] = jnp.maximum(coarse[slot], order[unit])
        return carry

    per = plan.stream // plan.unit
    begin, end = jnp.maximum(first, step * per), jnp.minimum(last, (step + 1) * per)
    lax.fori_loop(begin, end, score, 0)

    @pl.when(step == steps - 1)
    def _():
        threshold, cut = _threshold(
            order, coarse if use_coarse else None, low, high, first, last, plan, topk
        )
        groups = scalars[at + 2], scalars[at + 3]
        _write(word_ref, order, threshold, cut, low, high, groups, plan)


def _order_preserving(scores, native):
    """float32 -> int32 of the same order, -0 as 0, NaN as -inf, all above INVISIBLE."""
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(scores != scores, -jnp.inf, scores)
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # Native scores are bf16: half the bits, half the steps of the bisection.
    return bits >> 16 if native else bits


def _position(unit, plan):
    """The entry of every element of a unit."""
    shape = (plan.rows, plan.lanes)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    if not plan.folded:
        return unit * plan.lanes + lane
    return (unit * plan.rows + lax.broadcasted_iota(jnp.int32, shape, 0)) * plan.lanes + lane


def _count(order, first, last, wanted, plan):
    """How many elements of each query are wanted(order, unit), float32 [rows, 1]."""

    def body(unit, count):
        return count + jnp.where(wanted(order[unit], unit), 1.0, 0.0)

    count = lax.fori_loop(first, last, body, jnp.zeros((plan.rows, plan.lanes), jnp.float32))
    count = jnp.sum(count, axis=1, keepdims=True)
    if plan.folded:
        count = jnp.broadcast_to(jnp.sum(count, axis=0, keepdims=True), count.shape)
    return count


def _middle(low, high):
    """Halfway, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def _some(mask):
    return jnp.max(jnp.where(mask, 1.0, 0.0)) > 0


def _threshold(order, coarse, low, high, first, last, plan, topk):
    """The topk-th largest of each row, and the entry before which its equals are taken too."""
    shape = (plan.rows, 1)
    low, high = jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)
    choosing = high - low > topk
    below = jnp.full(shape, INVISIBLE + 1, jnp.int32)
    above = jnp.full(shape, 0x7F800001, jnp.int32)
    if coarse is not None:
        below, above = _coarse_bounds(coarse, last > first, plan, topk)
    below = jnp.where(choosing, below, INVISIBLE)
    above = jnp.where(choosing, above, INVISIBLE + 1)

    def at_least(threshold):
        return _count(order, first, last, lambda keys, _: keys >= threshold, plan)

    reached = jnp.where(choosing, at_least(below), float(topk))

    def unfinished(state):
        below, above, reached = state
        return _some((_middle(below, above) > below) & (reached != topk))

    def step(state):
        below, above, reached = state
        middle = _middle(below, above)
        count = at_least(middle)
        open_ = middle > below
        enough = open_ & (count >= topk)
        below, above = jnp.where(enough, middle, below), jnp.where(enough, above, middle)
        return below, jnp.where(open_, above, below + 1), jnp.where(enough, count, reached)

    threshold, _, reached = lax.while_loop(unfinished, step, (below, above, reached))
    tied = choosing & (reached > topk)
    cut = lax.cond(
        _some(tied),
        lambda: _tie_cut(order, threshold, first, last, plan, topk),
        lambda: jnp.full(shape, plan.units * plan.unit, jnp.int32),
    )
    return threshold, jnp.where(tied, cut, plan.units * plan.unit)


def _coarse_bounds(coarse, scored, plan, topk):
    """Bounds of the threshold from the maxima of interleaved groups of entries, several per topk.

    topk groups reach a value only if topk entries do, so the topk-th largest maximum is a lower
    bound; of scores in random order little more than topk reach it.
    """
    slots = jnp.where(scored, coarse.shape[0], 0)
    largest = lax.fori_loop(
        0,
        slots,
        lambda slot, best: jnp.maximum(best, coarse[slot]),
        jnp.full((plan.rows, plan.lanes), INVISIBLE, jnp.int32),
    )
    above = jnp.max(largest, axis=1, keepdims=True)
    if plan.folded:
        above = jnp.broadcast_to(jnp.max(above, axis=0, keepdims=True), above.shape)
    above = jnp.maximum(above, INVISIBLE + 1) + 1

    def step(_, state):
        low, high = state
        middle = _middle(low, high)
        enough = _count(coarse, 0, slots, lambda keys, _: keys >= middle, plan) >= topk
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    lowest = jnp.full(above.shape, INVISIBLE, jnp.int32)
    below, _ = lax.fori_loop(0, _COARSE_STEPS, step, (lowest, above))
    return jnp.maximum(below, INVISIBLE + 1), above


def _tie_cut(order, threshold, first, last, plan, topk):
    """The least entry before which, counting equals, a row has its topk: [rows, 1]."""

    def above(keys, _):
        return keys > threshold

    wanted = topk - _count(order, first, last, above, plan)

    def step(_, state):
        low, high = state
        middle = _middle(low, high)

        def early(keys, unit):
            return (keys == threshold) & (_position(unit, plan) < middle)

        enough = _count(order, first, last, early, plan) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    entries = plan.units * plan.unit
    low = jnp.zeros(threshold.shape, jnp.int32)
    steps = entries.bit_length()
    return lax.fori_loop(0, steps, step, (low, jnp.full(low.shape, entries, jnp.int32)))[1]


def _write(word_ref, order, threshold, cut, low, high, groups, plan):
    """The packed mask: a bit of 128 words for 128 neighbouring entries (kernels/membership.py)."""
    word_ref[...] = jnp.zeros(word_ref.shape, jnp.int32)

    def chosen(keys, position):
        visible = (position >= low) & (position < high)
        return visible & ((keys > threshold) | ((keys == threshold) & (position < cut)))

    def tiled(group):
        shape = (plan.rows, LANES)
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        units, parts = GROUP // plan.unit, plan.unit // LANES

        def add(unit, word):
            for part in range(parts):
                keys = order[group * units + unit, :, part * LANES : (part + 1) * LANES]
                bit = unit * parts + part
                mask = chosen(keys, group * GROUP + bit * LANES + lane)
                word = word | jnp.where(mask, jnp.left_shift(jnp.int32(1), bit), 0)
            return word

        return lax.fori_loop(0, units, add, jnp.zeros(shape, jnp.int32))

    def folded(group):
        word = jnp.zeros((plan.rows, LANES), jnp.int32)
        row = lax.broadcasted_iota(jnp.int32, word.shape, 0)
        lane = lax.broadcasted_iota(jnp.int32, word.shape, 1)
        for part in range(plan.lanes // LANES):
            keys = order[group, :, part * LANES : (part + 1) * LANES]
            bit = row * (plan.lanes // LANES) + part
            mask = chosen(keys, group * GROUP + bit * LANES + lane)
            word = word | jnp.where(mask, jnp.left_shift(jnp.ones_like(bit), bit), 0)
        # No bit is set in two rows.
        return functools.reduce(jnp.bitwise_or, [word[r : r + 1] for r in range(plan.rows)])

    def body(group, carry):
        at = pl.multiple_of(group * LANES, LANES)
        word_ref[:, pl.ds(at, LANES)] = (folded if plan.folded else tiled)(group)
        return carry

    lax.fori_loop(*groups, body, 0)
