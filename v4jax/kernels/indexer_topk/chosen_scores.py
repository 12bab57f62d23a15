"""Index scores at given entries, a block of queries at a time, and their gradient: plain XLA."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.indexer_topk import compact_keys, reference
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.ops import varying

# Elements of the gathered rows of a block, [B, Q, K, Z].
BLOCK = 1 << 24


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def index_scores_at(q_BTIZ, weight_BTI, keys_BCZ, chosen_BTK, native):
    """See api.index_scores_at."""
    return _forward(q_BTIZ, weight_BTI, keys_BCZ, chosen_BTK, native)[0]


def _forward(q_BTIZ, weight_BTI, keys_BCZ, chosen_BTK, native):
    residuals = (q_BTIZ, weight_BTI, keys_BCZ, chosen_BTK)

    def one(_, block):
        q, weight, chosen = block
        score = functools.partial(reference.index_scores_of_rows, native=native)
        scores = score(q, weight, _rows(keys_BCZ, chosen))
        return None, jnp.where(chosen < 0, 0.0, scores)

    blocks, length = _blocks(residuals, q_BTIZ, weight_BTI, chosen_BTK)
    _, scores = jax.lax.scan(one, None, blocks)
    return _joined(scores, length), residuals


def _backward(native, residuals, g_BTK):
    q_BTIZ, weight_BTI, keys_BCZ, chosen_BTK = residuals

    def one(dkeys, block):
        q, weight, chosen, g = block
        rows = _rows(keys_BCZ, chosen)
        g = jnp.where(chosen < 0, 0.0, g)
        dq, dweight, drows = reference.rows_gradient(q, weight, rows, g, native=native)
        batch = jnp.arange(chosen.shape[0], dtype=jnp.int32)[:, None, None]
        # -1 would be the last row; nothing is added there, its gradient being 0.
        return dkeys.at[batch, chosen].add(drows), (dq, dweight)

    blocks, length = _blocks(residuals, q_BTIZ, weight_BTI, chosen_BTK, g_BTK)
    zeros = varying.with_axes_of(jnp.zeros(keys_BCZ.shape, jnp.float32), blocks)
    dkeys, parts = jax.lax.scan(one, zeros, blocks)
    dq, dweight = (_joined(part, length) for part in parts)
    return (
        dq.astype(q_BTIZ.dtype),
        dweight.astype(weight_BTI.dtype),
        dkeys.astype(keys_BCZ.dtype),
        None,
    )


index_scores_at.defvjp(_forward, _backward)


def _rows(keys_BCZ, chosen_BQK):
    if isinstance(keys_BCZ, CompactKeys):
        return compact_keys.take(keys_BCZ, jnp.maximum(chosen_BQK, 0))
    batch = jnp.arange(chosen_BQK.shape[0], dtype=jnp.int32)[:, None, None]
    return keys_BCZ[batch, jnp.maximum(chosen_BQK, 0)]


def _blocks(residuals, *arrays):
    """The arrays [B,T,...] as [blocks, B, Q, ...], padded, and T."""
    _, _, keys, chosen = residuals
    batch, length, count = chosen.shape
    block = min(length, max(1, BLOCK // (batch * count * keys.shape[2])))
    padding = -length % block

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays), length


def _joined(blocks, length):
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
