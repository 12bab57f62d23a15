"""Index scores and choice as architecture section 6 reads: the whole [B,T,C], a stable sort."""

import jax
import jax.numpy as jnp


def index_scores(q_BTIZ, weight_BTI, keys_BCZ, *, chain: bool = False):
    """sum_i weight[t,i] * relu(q[t,i] . key[c]): float32 [B,T,C]."""

    def rounded(x):
        # A chain of bf16 tensors, as the released code computes it; the reductions are float32.
        return jax.lax.reduce_precision(x, 8, 7) if chain else x

    q, weight, keys = (x.astype(jnp.float32) for x in (q_BTIZ, weight_BTI, keys_BCZ))
    dots = rounded(jnp.einsum("btiz,bcz->btic", q, keys))
    terms = rounded(jax.nn.relu(dots) * weight[..., None])
    return rounded(terms.sum(2))


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
