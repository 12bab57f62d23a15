"""Stored rows in a TPU's VMEM: words and tails to rows of channels."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.sparse_attention.stored import (
    GROUP,
    LANES,
    PLANES,
    SCALES,
    TAIL,
    bf16_of,
    byte,
    e4m3,
    exp2,
    quarter,
)


def tails_of_tile(tails):
    """The rows of `tails` of a tile of entries, [K/4,128], as one row per entry, its own first."""
    parts = [
        pltpu.roll(tails[start : start + TAIL], -TAIL * k % LANES, 1)
        for start in range(0, tails.shape[0], TAIL)
        for k in range(PLANES)
    ]
    return jnp.concatenate(parts, axis=0)


def tails_of_rows(tails, ids):
    """The fetched rows of `tails` of entries `ids` [1,K], each [K,128] with its own part first."""
    count = tails.shape[0]
    # A row of numbers to a column; sums over lanes are float32.
    own_quarter = quarter(jnp.maximum(ids, 0)).astype(jnp.float32)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (count, count), axis) for axis in (0, 1))
    own_quarter = jnp.where(row == column, own_quarter, 0.0).sum(1, keepdims=True)
    own = tails
    for k in range(1, PLANES):
        own = jnp.where(own_quarter == k, pltpu.roll(tails, LANES - TAIL * k, 1), own)
    return own


def expand(words, tails, dtype):
    """Rows [K,512] of words [K,128] and of tails [K,128] that begin with the row's own."""
    lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
    parts = []
    for i in range(PLANES):
        code = byte(words, i)
        if i < PLANES - 1:
            scale = jnp.where(lane < GROUP, _scale(tails, 2 * i), _scale(tails, 2 * i + 1))
            part = e4m3(code) * scale
        else:
            rope = bf16_of(code, _low_bytes(tails, lane))
            part = jnp.where(lane < GROUP, e4m3(code) * _scale(tails, 2 * i), rope)
        parts.append(part.astype(dtype))
    return jnp.concatenate(parts, axis=-1)


def _scale(tails, group):
    """A group's factor, [K,1]."""
    column = SCALES + group // 4
    return exp2(byte(tails[:, column : column + 1], group % 4))


def _low_bytes(tails, lane):
    """The low bytes of the rope channels, where the high ones are: in lanes 64 to 127."""
    low = jnp.zeros_like(tails)
    for i in range(4):
        moved = pltpu.roll(tails, GROUP + SCALES * i, 1)
        low = jnp.where(lane // SCALES == GROUP // SCALES + i, byte(moved, i), low)
    return low
