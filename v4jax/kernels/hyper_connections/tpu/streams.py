"""What a TPU kernel does to the streams of a tile: loops over 16 tokens and a few hundred channels.

Streams are refs [M, T, D]; a token's coefficients are columns of a [T, 128] ref ("tall"), where a
coefficient spreads over the channels' lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from v4jax.kernels.hyper_connections.tpu.tiles import LANES, ROWS, round_up

FLOAT32 = jax.lax.Precision.HIGHEST


def for_rows(tokens: int, body):
    """Calls body(rows) for every 16 tokens."""

    def step(r, _):
        body(pl.ds(pl.multiple_of(r * ROWS, ROWS), ROWS))

    jax.lax.fori_loop(0, tokens // ROWS, step, None)


def for_channels(d: int, channels: int, body, carry=None):
    """carry = body(columns, carry) for every tile of channels."""

    def step(c, carry):
        return body(pl.ds(pl.multiple_of(c * channels, channels), channels), carry)

    return jax.lax.fori_loop(0, d // channels, step, carry)


def load(ref, *index):
    return ref[index].astype(jnp.float32)


def fold(x):
    """[R, C] to [R, 128]: what a sum over lanes has left to add."""
    return functools.reduce(jnp.add, [x[:, c : c + LANES] for c in range(0, x.shape[1], LANES)])


def columns(tall_ref, rows, indices):
    """Columns of a [T, 128] ref, each [16, 1]."""
    block = tall_ref[rows, :]
    return [block[:, i : i + 1] for i in indices]


def store_sums(tall_ref, rows, folded):
    """tall[rows, k] = the sum over lanes of folded[k]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    out = jnp.zeros((ROWS, LANES), jnp.float32)
    for k, x in enumerate(folded):
        out = jnp.where(lane == k, jnp.sum(x, axis=1, keepdims=True), out)
    tall_ref[rows, :] = out


def to_tall(wide_XT, tall_ref):
    """[X, T], tokens on lanes, into the first X columns of [T, 128]."""
    tall_ref[:, : wide_XT.shape[0]] = wide_XT.T


def from_tall(tall_ref, count: int):
    """The first columns of [T, 128] as [count, T]."""
    return tall_ref[...].T[:count]


def squares(h_ref, tall_ref, channels):
    """tall[:, 0] = the sum of squares of a token's streams."""
    m, tokens, d = h_ref.shape

    def group(rows):
        def tile(cols, total):
            for i in range(m):
                v = load(h_ref, i, rows, cols)
                total = total + fold(v * v)
            return total

        zero = jnp.zeros((ROWS, LANES), jnp.float32)
        store_sums(tall_ref, rows, [for_channels(d, channels, tile, zero)])

    for_rows(tokens, group)


def collapse(h_ref, tall_ref, u_ref, channels):
    """u = sum_i tall[:, i] * h[i]."""
    m, tokens, d = h_ref.shape

    def group(rows):
        weight = columns(tall_ref, rows, range(m))

        def tile(cols, _):
            u = sum(weight[i] * load(h_ref, i, rows, cols) for i in range(m))
            u_ref[rows, cols] = u.astype(u_ref.dtype)

        for_channels(d, channels, tile)

    for_rows(tokens, group)


def recombine(y_ref, h_ref, tall_ref, out_ref, channels):
    """out[j] = post[j] * y + sum_i comb[i, j] * h[i]; columns of tall: post, comb row major."""
    m, tokens, d = h_ref.shape

    def group(rows):
        coefficient = columns(tall_ref, rows, range(m + m * m))

        def tile(cols, _):
            y = load(y_ref, rows, cols)
            h = [load(h_ref, i, rows, cols) for i in range(m)]
            for j in range(m):
                kept = sum(coefficient[m + i * m + j] * h[i] for i in range(m))
                new = coefficient[j] * y + kept
                out_ref[j, rows, cols] = new.astype(out_ref.dtype)

        for_channels(d, channels, tile)

    for_rows(tokens, group)


def project(h_ref, fn_ref, x: int):
    """fn @ v for the tile's tokens, [X, T].

    fn is float32 [M, X, D], or for bfloat16 streams three bfloat16 parts of it below each other
    [M, 3 X', D], X' = X rounded up to 8: the exact product for one pass of the matrix unit.
    """
    m = h_ref.shape[0]
    exact = h_ref.dtype == jnp.bfloat16
    precision = None if exact else FLOAT32

    def one(i):
        return jax.lax.dot_general(
            fn_ref[i],
            h_ref[i],
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    raw = functools.reduce(jnp.add, [one(i) for i in range(m)])
    if not exact:
        return raw
    part = round_up(x, 8)
    return (raw[2 * part : 2 * part + x] + raw[part : part + x]) + raw[:x]
