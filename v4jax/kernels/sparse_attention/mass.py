"""How much of each query's attention went to each entry: the teacher of the indexer's loss."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from v4jax.kernels.sparse_attention import query_blocks
from v4jax.kernels.sparse_attention.entries import as_rows, take
from v4jax.kernels.sparse_attention.stored import StoredRows

QUERY_BLOCK = 64


@jax.named_scope("attention_mass")
@functools.partial(jax.jit, static_argnames="scale", inline=True)
def attention_mass(
    q_BTNH: Inexact[Array, "b t n h"],
    lse_BTN: Float[Array, "b t n"],
    entries_BCH: Inexact[Array, "b c h"] | Inexact[Array, "b c _ _"] | StoredRows,
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
    length = keys_BTK.shape[1]
    padding = -length % min(QUERY_BLOCK, length)
    parts = (length + padding) // min(QUERY_BLOCK, length)
    arrays = jax.lax.stop_gradient((q_BTNH, lse_BTN, keys_BTK))
    blocks = [query_blocks.split(query_blocks.pad(x, after=padding), parts) for x in arrays]
    entries = jax.lax.stop_gradient(as_rows(entries_BCH))

    def one(block):
        q, lse, keys = block
        kv = take(entries, jnp.maximum(keys, 0)).astype(jnp.float32)
        scores = jnp.einsum("btnh,btkh->btnk", q.astype(jnp.float32), kv) * scale
        mass = jnp.sum(jnp.exp(scores - lse[..., None]), axis=2)
        return jnp.where(keys >= 0, mass, 0.0)

    return query_blocks.join(jax.lax.map(one, blocks))[:, :length]
