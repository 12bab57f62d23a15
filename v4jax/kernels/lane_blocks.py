"""Words of entries, entries along the last axis: [..., N, W, L] is N blocks of L entries.

W words of an entry stand under one another, so that a TPU's tiles of 128 lanes are full of entries,
whatever W is; and a write of one entry goes to a block by its number, since XLA would lay out (and
copy) the whole list anew for a write at a lane that it does not know.
"""

from typing import Any

import jax
import jax.numpy as jnp

LANES = 128


def size_of(count: int) -> int:
    """Entries of a block of a list of `count`, which it divides."""
    return next(size for size in (LANES, LANES // 2, count) if count % size == 0)


def empty(lead: tuple[int, ...], count: int, words: int, size: int) -> jax.Array:
    """Zeros for `count` entries of so many words, in blocks of `size`."""
    return jnp.zeros((*lead, count // size, words, size), jnp.int32)


def of_rows(x: jax.Array) -> jax.Array:
    """Rows of words [...,C,W] as one block."""
    return jnp.swapaxes(x, -1, -2)[..., None, :, :]


def as_rows(x: jax.Array) -> jax.Array:
    """[...,C,W] of all blocks."""
    *lead, blocks, words, size = x.shape
    return jnp.swapaxes(x, -1, -2).reshape(*lead, blocks * size, words)


def as_lines(x: jax.Array) -> jax.Array:
    """[...,W,C] of all blocks."""
    *lead, blocks, words, size = x.shape
    return jnp.swapaxes(x, -2, -3).reshape(*lead, words, blocks * size)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [B,...,W] of a list [B,N,W,L] at index [B,...]."""
    batch = jnp.arange(index.shape[0], dtype=jnp.int32).reshape(-1, *(1 for _ in index.shape[1:]))
    return x[batch, index // x.shape[-1], :, index % x.shape[-1]]


def cut(x: jax.Array, begin, size: int) -> jax.Array:
    """Entries of a list [B,N,W,L] from `begin` on: whole blocks, or a part of a list of one."""
    if x.shape[1] == 1:
        return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=3)
    blocks = size // x.shape[-1]
    return jax.lax.dynamic_slice_in_dim(x, begin // x.shape[-1], blocks, axis=1)


def pad(x: jax.Array, missing: int) -> jax.Array:
    """A list [B,N,W,L] with so many more entries of zeros, whole blocks of them if N > 1."""
    if x.shape[1] == 1:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return jnp.pad(x, ((0, 0), (0, missing // x.shape[-1]), (0, 0), (0, 0)))


def spanning(count: int, x: Any) -> int:
    """Blocks of a list that `count` entries may touch, wherever they begin."""
    size = x.shape[-1]
    return min((count + size - 2) // size + 1, x.shape[-3])


def first_block(first, blocks: int, x: Any):
    """Where so many blocks of a list begin that hold entry `first`, and as many behind it."""
    return jnp.clip(first // x.shape[-1], 0, x.shape[-3] - blocks)
