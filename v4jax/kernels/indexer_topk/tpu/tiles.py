"""What the indexer's TPU kernels share: how a tile of queries lies in memory, and its scores."""

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from v4jax.kernels.indexer_topk.stored_keys import (
    NIBBLES,
    StoredKeys,
    e2m1,
    exp2,
    nibble,
    scale_of,
)

LANES = 128
SUBLANES = 8
# Keys of one matmul: two registers across, as wide as the widest matrix unit.
WIDE = 256
DTYPES = ("bfloat16", "float32")


def refuse_types(q_BTIZ, keys_BCZ) -> str | None:
    """Why the kernels cannot take arguments of these types."""
    for name, x in (("q", q_BTIZ), ("keys", keys_BCZ)):
        if not isinstance(x, StoredKeys) and x.dtype.name not in DTYPES:
            return f"{name} is {x.dtype.name}; supported are {' and '.join(DTYPES)}"
    return None


def pad_to(x, axis, multiple):
    """Zeros appended along the axis up to a multiple."""
    short = -x.shape[axis] % multiple
    if not short:
        return x
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])


def pad_channels(q_BTIZ, keys_BCZ):
    """Both as one type, their channels padded to whole registers: zeros change no score."""
    if isinstance(keys_BCZ, StoredKeys):
        return q_BTIZ, keys_BCZ
    dtype = jnp.promote_types(q_BTIZ.dtype, keys_BCZ.dtype)
    return pad_to(q_BTIZ.astype(dtype), 3, LANES), pad_to(keys_BCZ.astype(dtype), 2, LANES)


def by_head(q_BTIZ, tile):
    """[B, tiles, I * tile, Z]: the rows of a tile, head by head."""
    return einops.rearrange(pad_to(q_BTIZ, 1, tile), "b (n t) i z -> b n (i t) z", t=tile)


def from_by_head(rows, tile, length):
    """The [B,T,I,Z] that `by_head` took."""
    return einops.rearrange(rows, "b n (i t) z -> b (n t) i z", t=tile)[:, :length]


def weight_tiles(weight_BTI, tile):
    """float32 [B, tiles, tile, I], or [B, T, I, 1] for tiles of one query."""
    weight = pad_to(weight_BTI.astype(jnp.float32), 1, tile)
    if tile == 1:
        return weight[..., None]
    return einops.rearrange(weight, "b (n t) i -> b n t i", t=tile)


def spread_weights(weight_ref, spread_ref):
    """A tile's weights, one across each row of `spread_ref` [I * tile, LANES]."""
    count = spread_ref.shape[0]
    if weight_ref.shape == (count, 1):
        spread_ref[...] = jnp.broadcast_to(weight_ref[...], spread_ref.shape)
        return
    tile, heads = weight_ref.shape
    for head in range(heads):
        weight = jnp.broadcast_to(weight_ref[:, head : head + 1], (tile, LANES))
        spread_ref[head * tile : (head + 1) * tile, :] = weight


def matmul(a, b, dims=((1,), (1,))):
    """A product on the matrix unit, summed in float32; float32 arguments keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def rounded(x, native, interpret):
    """A step of native numerics: a bf16 tensor after each."""
    if not native:
        return x
    if interpret:  # compiled by XLA, which may drop a pair of casts
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def relu(x, interpret):
    """max(x, 0), NaN for a NaN: of infinite queries, whose scores are the lowest."""
    if interpret:  # compiled by XLA:CPU, whose maximum makes 0 of a NaN
        return jnp.where(x < 0, 0.0, x)
    return jax.nn.relu(x)


def scores(q_ref, keys_ref, spread_ref, start, count, tile, native, interpret):
    """Scores of `count` keys from `start` on, as pairs of offset and [tile, LANES].

    keys_ref: of rows of keys, or `StoredKeys` of references.
    """
    wide = min(WIDE, count)
    for offset in range(0, count, wide):
        own = pl.ds(start + offset, wide)
        if isinstance(keys_ref, StoredKeys):
            own = pl.ds(pl.multiple_of(start + offset, wide), wide)
            keys = expand(keys_ref.codes[:, own], keys_ref.scales[:, own], q_ref.dtype)
            dots = matmul(q_ref[...], keys, ((1,), (0,)))
        else:
            dots = matmul(q_ref[...], keys_ref[own, :])
        for lane in range(0, wide, LANES):
            part = rounded(dots[:, lane : lane + LANES], native, interpret)
            terms = rounded(relu(part, interpret) * spread_ref[...], native, interpret)
            yield offset + lane, rounded(sum_heads(terms, tile), native, interpret)


def expand(codes, scales, dtype):
    """Keys [channels, keys] of stored ones, [words, keys] and [1, keys]."""
    parts = [
        (e2m1(nibble(codes, i)) * exp2(scale_of(scales, i))).astype(dtype) for i in range(NIBBLES)
    ]
    return jnp.concatenate(parts, axis=0)


def sum_heads(terms, tile):
    """[I * tile, LANES] -> [tile, LANES]."""
    if tile == 1:
        return jnp.sum(terms, axis=0, keepdims=True)
    return jnp.sum(terms.reshape(-1, tile, LANES), axis=0)


def over_heads(x, count):
    """[tile, LANES] -> [I * tile, LANES], the same for every head."""
    tile = x.shape[0]
    return jnp.broadcast_to(x[None], (count // tile, tile, LANES)).reshape(count, LANES)
