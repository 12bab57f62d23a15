"""Dense index scores and their gradient on a GPU (Pallas Triton), dot products recomputed."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels import blocks
from v4jax.kernels.indexer_topk.gpu import tiles as gpu_tiles

# Keys of a tile in the two backward kernels, and the programs that fill a GPU twice.
QUERY_KEYS, KEY_KEYS = 64, 128
PROGRAMS = 264


def refuse(q_BTIZ, weight_BTI, keys_BCZ, *_) -> str | None:
    """Why this implementation cannot take the arguments."""
    if keys_BCZ.shape[0] > 65535:
        return f"B is {keys_BCZ.shape[0]}; supported are at most 65535 sequences"
    return gpu_tiles.refuse(q_BTIZ, keys_BCZ)


def index_scores(q_BTIZ, weight_BTI, keys_BCZ, *, native: bool, interpret: bool):
    """See api.index_scores."""
    sizes = blocks.blocks("cuda").indexer_topk
    return _forward(q_BTIZ, weight_BTI, keys_BCZ, sizes=sizes, native=native, interpret=interpret)


def index_scores_gradient(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, *, native: bool, interpret: bool):
    """(dq, dweight, dkeys), float32."""
    return _backward(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, native=native, interpret=interpret)


def _whole(*shape):
    return pl.BlockSpec((None, *shape), lambda *ids: (ids[-1], *(0 for _ in shape)))


@functools.partial(jax.jit, static_argnames=("sizes", "native", "interpret"))
def _forward(q_BTIZ, weight_BTI, keys_BCZ, *, sizes, native, interpret):
    batch, length = q_BTIZ.shape[:2]
    entries = keys_BCZ.shape[1]
    q, weight, keys = gpu_tiles.prepared(q_BTIZ, weight_BTI, keys_BCZ)
    tile = sizes.keys if keys.dtype == jnp.bfloat16 else min(sizes.keys, gpu_tiles.FLOAT32_KEYS)
    group = min(sizes.queries, 1 << (length - 1).bit_length())
    padded = gpu_tiles.round_up(length, group)
    width = gpu_tiles.round_up(entries, tile)
    q, weight = gpu_tiles.pad_to(q, 1, padded), gpu_tiles.pad_to(weight, 1, padded)
    scores = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            group=group,
            tile=tile,
            rows=entries,
            heads=q_BTIZ.shape[2],
            native=native,
            interpret=interpret,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, padded, width), jnp.float32),
        grid=(padded // group, width // tile, batch),
        in_specs=[_whole(*q.shape[1:]), _whole(*weight.shape[1:]), _whole(*keys.shape[1:])],
        out_specs=_whole(padded, width),
        compiler_params=plt.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        name="index_scores",
        interpret=interpret,
    )(q, weight, keys)
    return scores[:, :length, :entries]


def _forward_kernel(
    q_ref, weight_ref, keys_ref, scores_ref, *, group, tile, rows, heads, native, interpret
):
    first, start = pl.program_id(0) * group, pl.program_id(1) * tile
    keys = gpu_tiles.load_rows(keys_ref, start, tile, rows)

    def body(index, carry):
        t = first + index
        scores = gpu_tiles.scores(keys, q_ref[t], weight_ref[t], heads, native, interpret)
        scores_ref[t, pl.ds(start, tile)] = scores
        return carry

    lax.fori_loop(0, group, body, 0)


@functools.partial(jax.jit, static_argnames=("native", "interpret"))
def _backward(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, *, native, interpret):
    heads, channels = q_BTIZ.shape[2:]
    entries = keys_BCZ.shape[1]
    q, weight, keys = gpu_tiles.prepared(q_BTIZ, weight_BTI, keys_BCZ)
    # Padding has no gradient, so it gives none.
    width = gpu_tiles.round_up(entries, KEY_KEYS)
    keys = gpu_tiles.pad_to(keys, 1, width)
    g = gpu_tiles.pad_to(g_BTC.astype(jnp.float32), 2, width)
    dq, dweight = _query_gradient(q, weight, keys, g, native, interpret)
    dkeys = _key_gradient(q, weight, keys, g, interpret)
    return dq[:, :, :heads, :channels], dweight[..., :heads], dkeys[:, :entries, :channels]


def _key_tile(keys, tile):
    return tile if keys.dtype == jnp.bfloat16 else gpu_tiles.FLOAT32_KEYS


def _query_gradient(q, weight, keys, g, native, interpret):
    batch, length, heads, channels = q.shape

    def of_query(t, b):
        return b, t, 0, 0

    def row(t, b):
        return b, t, 0

    tile = _key_tile(keys, QUERY_KEYS)
    return pl.pallas_call(
        functools.partial(_query_kernel, tile=tile, native=native, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(weight.shape, jnp.float32),
        ),
        grid=(length, batch),
        in_specs=[
            pl.BlockSpec((None, None, heads, channels), of_query),
            pl.BlockSpec((None, None, heads), row),
            _whole(*keys.shape[1:]),
            pl.BlockSpec((None, None, g.shape[2]), row),
        ],
        out_specs=(
            pl.BlockSpec((None, None, heads, channels), of_query),
            pl.BlockSpec((None, None, heads), row),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        name="index_scores_dq",
        interpret=interpret,
    )(q, weight, keys, g)


def _query_kernel(
    q_ref, weight_ref, keys_ref, g_ref, dq_ref, dweight_ref, *, tile, native, interpret
):
    """Heads are the rows: the slope of the dot products is the left side of the second matmul."""
    q, weight = q_ref[...], weight_ref[...]

    def body(index, carry):
        dq, dweight = carry
        at = pl.ds(index * tile, tile)
        keys, g = keys_ref[at, :], g_ref[at]
        dots = gpu_tiles.matmul(q, keys, trans_b=True)
        relu = jax.nn.relu(gpu_tiles.rounded(dots, native, interpret))
        slope = jnp.where(dots > 0, weight[:, None] * g[None, :], 0.0).astype(keys.dtype)
        dweight = dweight + jnp.sum(relu * g[None, :], axis=1)
        return dq + gpu_tiles.matmul(slope, keys), dweight

    zero = jnp.zeros(q.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    dq_ref[...], dweight_ref[...] = lax.fori_loop(0, keys_ref.shape[0] // tile, body, zero)


def _key_gradient(q, weight, keys, g, interpret):
    batch, length, heads, channels = q.shape
    tile = _key_tile(keys, KEY_KEYS)
    tiles = keys.shape[1] // tile
    # Few key tiles: several programs each, over parts of the queries, whose sums are added after.
    parts = 1 << (-(-PROGRAMS // (batch * tiles)) - 1).bit_length()
    per = -(-length // min(parts, length))
    parts = -(-length // per)
    # A loop of a length known here keeps the matmuls asynchronous.
    length = parts * per
    q, weight, g = (gpu_tiles.pad_to(x, 1, length) for x in (q, weight, g))
    dkeys = pl.pallas_call(
        functools.partial(_key_kernel, per=per),
        out_shape=jax.ShapeDtypeStruct((batch, parts, *keys.shape[1:]), jnp.float32),
        grid=(tiles, parts, batch),
        in_specs=[
            _whole(length, heads, channels),
            _whole(length, heads),
            pl.BlockSpec((None, tile, channels), lambda c, p, b: (b, c, 0)),
            pl.BlockSpec((None, length, tile), lambda c, p, b: (b, 0, c)),
        ],
        out_specs=pl.BlockSpec((None, None, tile, channels), lambda c, p, b: (b, p, c, 0)),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
        name="index_scores_dkeys",
        interpret=interpret,
    )(q, weight, keys, g)
    return dkeys[:, 0] if parts == 1 else jnp.sum(dkeys, axis=1)


def _key_kernel(q_ref, weight_ref, keys_ref, g_ref, dkeys_ref, *, per):
    """Keys are the rows, as in the forward kernel."""
    first = pl.program_id(1) * per
    keys = keys_ref[...]

    def body(index, dkeys):
        t = first + index
        q = q_ref[t]
        dots = gpu_tiles.matmul(keys, q, trans_b=True)
        slope = jnp.where(dots > 0, g_ref[t][:, None] * weight_ref[t][None, :], 0.0)
        return dkeys + gpu_tiles.matmul(slope.astype(q.dtype), q)

    dkeys_ref[...] = lax.fori_loop(0, per, body, jnp.zeros(keys.shape, jnp.float32))
