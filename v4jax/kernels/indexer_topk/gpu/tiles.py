"""What the indexer's GPU kernels share: shapes Triton can take, and the scores of a tile."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels.indexer_topk.stored_keys import (
    WIDTH,
    WORDS,
    StoredKeys,
    e2m1,
    exp2,
    nibble,
    scale_of,
)

# A side of a matmul in Triton is a power of two, this at least.
LEAST = 16
# Without tensor cores, wider tiles of float32 do not fit the registers.
FLOAT32_KEYS = 16
DTYPES = ("bfloat16", "float32")
# Index heads x channels of a tile of queries that fit shared memory twice over.
LARGEST_QUERY = 64 * 256


def refuse(q_BTIZ, keys_BCZ) -> str | None:
    """Why the kernels cannot take such queries and keys."""
    for name, x in (("q", q_BTIZ), ("keys", keys_BCZ)):
        if not isinstance(x, StoredKeys) and x.dtype.name not in DTYPES:
            return f"{name} is {x.dtype.name}; supported are {' and '.join(DTYPES)}"
    heads, width = (power_of_two(size) for size in q_BTIZ.shape[2:])
    if heads * width > LARGEST_QUERY:
        return f"I x Z is {heads} x {width} (padded); supported is a product up to {LARGEST_QUERY}"
    return None


def power_of_two(size):
    """The next power of two that a matmul can take."""
    return max(LEAST, 1 << (size - 1).bit_length())


def pad_to(x, axis, size):
    """Zeros appended along the axis up to `size`."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])


def prepared(q_BTIZ, weight_BTI, keys_BCZ):
    """Heads and channels padded to powers of two; `scores` leaves the padded heads out."""
    heads, width = (power_of_two(size) for size in q_BTIZ.shape[2:])
    if isinstance(keys_BCZ, StoredKeys):
        weight = pad_to(weight_BTI.astype(jnp.float32), 2, heads)
        return pad_to(q_BTIZ, 2, heads), weight, keys_BCZ
    dtype = jnp.promote_types(q_BTIZ.dtype, keys_BCZ.dtype)
    q = pad_to(pad_to(q_BTIZ.astype(dtype), 2, heads), 3, width)
    weight = pad_to(weight_BTI.astype(jnp.float32), 2, heads)
    return q, weight, pad_to(keys_BCZ.astype(dtype), 2, width)


def round_up(size, multiple):
    return -(-size // multiple) * multiple


def matmul(a, b, **transposed):
    """A product summed in float32; float32 arguments keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, precision=precision, **transposed)


def rounded(x, native, interpret):
    """A step of native numerics: a bf16 tensor after each."""
    if not native:
        return x
    if interpret:  # compiled by XLA, which may drop a pair of casts
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def load_rows(ref, start, count, rows):
    """`count` rows from `start` on, zeros past the last of `rows`."""
    row = start + lax.broadcasted_iota(jnp.int32, (count, ref.shape[1]), 0)
    return plt.load(ref.at[pl.ds(start, count), :], mask=row < rows, other=0.0)


def load_stored(stored: StoredKeys, start, count, keys, dtype):
    """`count` stored keys (references) from `start` on as rows, zeros past the last of `keys`."""
    key = start + lax.broadcasted_iota(jnp.int32, (count, WIDTH), 0)
    channel = lax.broadcasted_iota(jnp.int32, (count, WIDTH), 1)
    inside = key < keys
    word = plt.load(stored.codes.at[channel & (WORDS - 1), key], mask=inside, other=0)
    own = start + jnp.arange(count)
    scales = plt.load(stored.scales.at[0, own], mask=own < keys, other=0)
    which = channel >> 4  # nibble i of word j is channel 16 i + j
    value = e2m1(nibble(word, which)) * exp2(scale_of(scales[:, None], which))
    return jnp.where(inside, value, 0.0).astype(dtype)


def scores(keys, q, weight, heads, native, interpret):
    """[K, Z], [I, Z] and [I] -> [K], the sum over the first `heads` of the I.

    Padded heads are left out by number: an infinite key times their zeros is no number. The keys
    are the rows of the matmul: its accumulators then hold a key's heads in four threads
    of one warp, which sum them with two shuffles.
    """
    dots = rounded(matmul(keys, q, trans_b=True), native, interpret)
    if heads < q.shape[0]:
        dots = jnp.where(lax.broadcasted_iota(jnp.int32, dots.shape, 1) < heads, dots, 0.0)
    terms = rounded(jax.nn.relu(dots) * weight[None, :], native, interpret)
    return rounded(jnp.sum(terms, axis=1), native, interpret)
