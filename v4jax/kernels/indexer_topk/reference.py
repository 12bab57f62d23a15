"""Index scores and choice as architecture section 6 reads: the whole [B,T,C], a stable sort."""

import jax
import jax.numpy as jnp


def index_scores(q_BTIZ, weight_BTI, keys_BCZ, *, chain: bool = False):
    """sum_i weight[t,i] * relu(q[t,i] . key[c]): float32 [B,T,C]."""

    q, weight, keys = (x.astype(jnp.float32) for x in (q_BTIZ, weight_BTI, keys_BCZ))
    dots = jnp.einsum("btiz,bcz->btic", q, keys)
    if not chain:
        # As a matmul the sum over heads is several times quicker on a CPU than as a reduction.
        return jnp.einsum("btic,bti->btc", jax.nn.relu(dots), weight)
    terms = _bf16(jax.nn.relu(_bf16(dots)) * weight[..., None])
    return _bf16(terms.sum(2))


def _bf16(x):
    """A step of the chain of bf16 tensors that the released code computes."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def indexer_topk(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, *, chain=False):
    """See api.indexer_topk."""
    scores = index_scores(q_BTIZ, weight_BTI, keys_BCZ, chain=chain)
    entry = jnp.arange(scores.shape[-1])[None, None]
    visible = (entry >= low_BT[..., None]) & (entry < high_BT[..., None])
    scores = jnp.where(visible, scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)[..., :topk]
    seen = jnp.take_along_axis(visible, order, axis=-1)
    last = scores.shape[-1]
    ordered = jnp.sort(jnp.where(seen, order, last), axis=-1)
    return jnp.where(ordered == last, -1, ordered).astype(jnp.int32)
