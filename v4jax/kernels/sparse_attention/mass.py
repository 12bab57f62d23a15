"""How much of each query's attention went to each entry: the teacher of the indexer's loss."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

QUERY_BLOCK = 64


@functools.partial(jax.jit, static_argnames="scale", inline=True)
def attention_mass(
    q_BTNH: Inexact[Array, "b t n h"],
    lse_BTN: Float[Array, "b t n"],
    entries_BCH: Inexact[Array, "b c h"],
    keys_BTK: Int[Array, "b t k"],
    *,
    scale: float,
) -> Float[Array, "b t k"]:
    """Probabilities of the joint softmax summed over heads, at the entries asked for.

    The probabilities are computed again from the log-sum-exp that `api.sparse_attention` returns
    with `with_lse`, a block of queries at a time; no array of T x C is made. No gradient.

    Args:
      keys_BTK: entries by index, -1 for none (mass 0): a query's choice, or for the dense stage a
        block of queries with every visible entry.
      scale: as in the attention.
    """
    batch, length, count = keys_BTK.shape
    block = min(QUERY_BLOCK, length)
    arrays = [_pad(jax.lax.stop_gradient(x), -length % block) for x in (q_BTNH, lse_BTN, keys_BTK)]
    blocks = [_split(x, block) for x in arrays]
    entries = jax.lax.stop_gradient(entries_BCH)
    row = jnp.arange(batch)[:, None, None]

    def one(block):
        q, lse, keys = block
        kv = entries[row, jnp.maximum(keys, 0)].astype(jnp.float32)
        scores = jnp.einsum("btnh,btkh->btnk", q.astype(jnp.float32), kv) * scale
        mass = jnp.sum(jnp.exp(scores - lse[..., None]), axis=2)
        return jnp.where(keys >= 0, mass, 0.0)

    mass = jnp.moveaxis(jax.lax.map(one, blocks), 0, 1)
    return mass.reshape(batch, -1, count)[:, :length]


def _pad(x, after):
    return jnp.pad(x, [(0, 0), (0, after)] + [(0, 0)] * (x.ndim - 2))


def _split(x, block):
    """[B,T,...] -> [T/block, B, block, ...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
