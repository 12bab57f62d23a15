"""Dense index scores and their gradient on a TPU, dot products recomputed a tile at a time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import blocks
from v4jax.kernels.indexer_topk.tpu import tiles as tpu_tiles
from v4jax.kernels.indexer_topk.tpu.tiles import LANES

# Keys of a grid step: enough work to hide what a step costs.
KEYS = 2048
VMEM = 48 << 20


class Inputs(NamedTuple):
    """What the gradients read: arrays outside, their blocks, or a kernel's references.

    Attributes:
      q: a tile of queries, rows head by head, [I * tile, Z]. weight: their heads' weights.
      keys: a tile of them, [K, Z]. g: the gradient of the scores, [tile, K].
    """

    q: Any
    weight: Any
    keys: Any
    g: Any


def refuse(q_BTIZ, weight_BTI, keys_BCZ, *_) -> str | None:
    """Why this implementation cannot take the arguments."""
    return tpu_tiles.refuse_types(q_BTIZ, keys_BCZ)


def index_scores(q_BTIZ, weight_BTI, keys_BCZ, *, native: bool, interpret: bool):
    """See api.index_scores."""
    tile = blocks.blocks("tpu").indexer_topk.queries
    return _forward(q_BTIZ, weight_BTI, keys_BCZ, tile=tile, native=native, interpret=interpret)


def index_scores_gradient(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, *, native: bool, interpret: bool):
    """(dq, dweight, dkeys), float32."""
    tile = blocks.blocks("tpu").indexer_topk.queries
    args = (q_BTIZ, weight_BTI, keys_BCZ, g_BTC)
    return _backward(*args, tile=tile, native=native, interpret=interpret)


def _key_tile(entries):
    return min(KEYS, -(-entries // tpu_tiles.WIDE) * tpu_tiles.WIDE)


def _params(semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)


def _prepared(q_BTIZ, weight_BTI, keys_BCZ, tile):
    q_BTIZ, keys_BCZ = tpu_tiles.pad_channels(q_BTIZ, keys_BCZ)
    keys_BCZ = tpu_tiles.pad_to(keys_BCZ, 1, _key_tile(keys_BCZ.shape[1]))
    return tpu_tiles.by_head(q_BTIZ, tile), tpu_tiles.weight_tiles(weight_BTI, tile), keys_BCZ


@functools.partial(jax.jit, static_argnames=("tile", "native", "interpret"))
def _forward(q_BTIZ, weight_BTI, keys_BCZ, *, tile, native, interpret):
    length, entries = q_BTIZ.shape[1], keys_BCZ.shape[1]
    rows, weight, keys = _prepared(q_BTIZ, weight_BTI, keys_BCZ, tile)
    batch, tiles, count, width = rows.shape
    key_tile = _key_tile(entries)
    scores = pl.pallas_call(
        functools.partial(_forward_kernel, tile=tile, native=native, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((batch, tiles * tile, keys.shape[1]), jnp.float32),
        grid=(batch, tiles, keys.shape[1] // key_tile),
        in_specs=[
            pl.BlockSpec((None, None, count, width), lambda b, t, c: (b, t, 0, 0)),
            pl.BlockSpec((None, None, *weight.shape[2:]), lambda b, t, c: (b, t, 0, 0)),
            pl.BlockSpec((None, key_tile, width), lambda b, t, c: (b, c, 0)),
        ],
        out_specs=pl.BlockSpec((None, tile, key_tile), lambda b, t, c: (b, t, c)),
        scratch_shapes=[pltpu.VMEM((count, LANES), jnp.float32)],
        compiler_params=_params(("parallel", "parallel", "arbitrary")),
        name="index_scores",
        interpret=interpret,
    )(rows, weight, keys)
    return scores[:, :length, :entries]


def _forward_kernel(q_ref, weight_ref, keys_ref, scores_ref, spread, *, tile, native, interpret):
    @pl.when(pl.program_id(2) == 0)
    def _():
        tpu_tiles.spread_weights(weight_ref, spread)

    def body(index, carry):
        start = pl.multiple_of(index * tpu_tiles.WIDE, tpu_tiles.WIDE)
        args = (q_ref, keys_ref, spread, start, tpu_tiles.WIDE, tile, native, interpret)
        for offset, part in tpu_tiles.scores(*args):
            scores_ref[:, pl.ds(start + offset, LANES)] = part
        return carry

    lax.fori_loop(0, keys_ref.shape[0] // tpu_tiles.WIDE, body, 0)


@functools.partial(jax.jit, static_argnames=("tile", "native", "interpret"))
def _backward(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, *, tile, native, interpret):
    _, length, heads, width = q_BTIZ.shape
    entries = keys_BCZ.shape[1]
    rows, weight, keys = _prepared(q_BTIZ, weight_BTI, keys_BCZ, tile)
    # Padding has no gradient, so it gives none.
    g = tpu_tiles.pad_to(tpu_tiles.pad_to(g_BTC.astype(jnp.float32), 1, tile), 2, keys.shape[1])
    inputs = Inputs(rows, weight, keys, g)
    drows, dweight = _query_gradient(inputs, tile=tile, native=native, interpret=interpret)
    dkeys = _key_gradient(inputs, tile=tile, interpret=interpret)
    dq = tpu_tiles.from_by_head(drows, tile, length)[..., :width]
    dweight = dweight.reshape(dweight.shape[0], -1, heads)[:, :length]
    return dq, dweight, dkeys[:, :entries, :width]


def _blocks(inputs, tile, query_first):
    """The inputs' blocks for a grid (batch, query tiles, key tiles), or the last two swapped."""
    _, _, count, width = inputs.q.shape
    key_tile = _key_tile(inputs.keys.shape[1])

    def block(shape, index):
        return pl.BlockSpec(
            (None, *shape), index if query_first else lambda b, c, t: index(b, t, c)
        )

    return Inputs(
        q=block((None, count, width), lambda b, t, c: (b, t, 0, 0)),
        weight=block((None, *inputs.weight.shape[2:]), lambda b, t, c: (b, t, 0, 0)),
        keys=block((key_tile, width), lambda b, t, c: (b, c, 0)),
        g=block((tile, key_tile), lambda b, t, c: (b, t, c)),
    )


def _query_gradient(inputs, *, tile, native, interpret):
    batch, tiles, count, _ = inputs.q.shape
    specs = _blocks(inputs, tile, query_first=True)
    return pl.pallas_call(
        functools.partial(_query_kernel, tile=tile, native=native, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32),
            jax.ShapeDtypeStruct(inputs.weight.shape, jnp.float32),
        ),
        grid=(batch, tiles, inputs.keys.shape[1] // _key_tile(inputs.keys.shape[1])),
        in_specs=[specs],
        out_specs=(specs.q, specs.weight),
        scratch_shapes=[pltpu.VMEM((count, LANES), jnp.float32)] * 2,
        compiler_params=_params(("parallel", "parallel", "arbitrary")),
        name="index_scores_dq",
        interpret=interpret,
    )(inputs)


def _query_kernel(inputs, dq_ref, dweight_ref, spread, total, *, tile, native, interpret):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        tpu_tiles.spread_weights(inputs.weight, spread)
        dq_ref[...] = jnp.zeros(dq_ref.shape, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def body(index, carry):
        start = pl.multiple_of(index * tpu_tiles.WIDE, tpu_tiles.WIDE)
        keys = inputs.keys[pl.ds(start, tpu_tiles.WIDE), :]
        dots = tpu_tiles.matmul(inputs.q[...], keys)
        g = inputs.g[:, pl.ds(start, tpu_tiles.WIDE)]
        for lane in range(0, tpu_tiles.WIDE, LANES):
            relu = jax.nn.relu(tpu_tiles.rounded(dots[:, lane : lane + LANES], native, interpret))
            total[...] += relu * tpu_tiles.over_heads(g[:, lane : lane + LANES], total.shape[0])
        slope = _slope(dots, g, spread).astype(keys.dtype)
        dq_ref[...] += tpu_tiles.matmul(slope, keys, ((1,), (0,)))
        return carry

    lax.fori_loop(0, inputs.keys.shape[0] // tpu_tiles.WIDE, body, 0)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for head in range(dweight_ref.shape[1]):
            part = total[head * tile : (head + 1) * tile, :]
            dweight_ref[:, head : head + 1] = jnp.sum(part, axis=1, keepdims=True)


def _slope(dots, g, spread):
    """The gradient of the dot products: g * weight where one is positive, [I * tile, WIDE]."""
    count = dots.shape[0]
    parts = []
    for lane in range(0, dots.shape[1], LANES):
        slope = tpu_tiles.over_heads(g[:, lane : lane + LANES], count) * spread[...]
        parts.append(jnp.where(dots[:, lane : lane + LANES] > 0, slope, 0.0))
    return jnp.concatenate(parts, axis=1)


def _key_gradient(inputs, *, tile, interpret):
    """Native rounding changes no sign, so this does not ask for it."""
    batch, tiles, count, _ = inputs.q.shape
    specs = _blocks(inputs, tile, query_first=False)
    return pl.pallas_call(
        _key_kernel,
        out_shape=jax.ShapeDtypeStruct(inputs.keys.shape, jnp.float32),
        grid=(batch, inputs.keys.shape[1] // _key_tile(inputs.keys.shape[1]), tiles),
        in_specs=[specs],
        out_specs=specs.keys,
        scratch_shapes=[pltpu.VMEM((count, LANES), jnp.float32)],
        compiler_params=_params(("parallel", "parallel", "arbitrary")),
        name="index_scores_dkeys",
        interpret=interpret,
    )(inputs)


def _key_kernel(inputs, dkeys_ref, spread):
    @pl.when(pl.program_id(2) == 0)
    def _():
        dkeys_ref[...] = jnp.zeros(dkeys_ref.shape, jnp.float32)

    tpu_tiles.spread_weights(inputs.weight, spread)

    def body(index, carry):
        start = pl.multiple_of(index * tpu_tiles.WIDE, tpu_tiles.WIDE)
        keys = inputs.keys[pl.ds(start, tpu_tiles.WIDE), :]
        dots = tpu_tiles.matmul(inputs.q[...], keys)
        slope = _slope(dots, inputs.g[:, pl.ds(start, tpu_tiles.WIDE)], spread)
        part = tpu_tiles.matmul(slope.astype(keys.dtype), inputs.q[...], ((0,), (0,)))
        dkeys_ref[pl.ds(start, tpu_tiles.WIDE), :] += part
        return carry

    lax.fori_loop(0, inputs.keys.shape[0] // tpu_tiles.WIDE, body, 0)
