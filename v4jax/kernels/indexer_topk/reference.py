"""Index scores and choice as architecture section 6 reads: the whole [B,T,C], a stable sort."""

import jax
import jax.numpy as jnp

from v4jax.kernels import membership
from v4jax.kernels.indexer_topk import forms


def index_scores(q_BTIZ, weight_BTI, keys_BCZ, *, native: bool = False):
    """sum_i weight[t,i] * relu(q[t,i] . key[c]): float32 [B,T,C]."""
    q, weight, keys = _float32(q_BTIZ, weight_BTI, keys_BCZ)
    return _weighted_sum(jnp.einsum("btiz,bcz->btic", q, keys), weight, native)


def index_scores_of_rows(q_BTIZ, weight_BTI, rows_BTKZ, *, native: bool = False):
    """The same where every query has rows of its own: float32 [B,T,K]."""
    q, weight, rows = _float32(q_BTIZ, weight_BTI, rows_BTKZ)
    return _weighted_sum(jnp.einsum("btiz,btkz->btik", q, rows), weight, native)


def _float32(*arrays):
    return tuple(x.astype(jnp.float32) for x in arrays)


def _weighted_sum(dots, weight, native):
    if not native:
        # As a matmul the sum over heads is several times faster on a CPU than as a reduction.
        return jnp.einsum("btic,bti->btc", jax.nn.relu(dots), weight)
    terms = _bf16(jax.nn.relu(_bf16(dots)) * weight[..., None])
    return _bf16(terms.sum(2))


def _bf16(x):
    """A step of native numerics: the released code computes bf16 tensors, one after the other."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def index_scores_gradient(q_BTIZ, weight_BTI, keys_BCZ, g_BTC, *, native: bool = False):
    """(dq, dweight, dkeys) for a gradient of the scores, float32; the rounding passes it as is."""
    q, weight, keys = _float32(q_BTIZ, weight_BTI, keys_BCZ)
    dots = jnp.einsum("btiz,bcz->btic", q, keys)
    relu, slope = _slopes(dots, weight, g_BTC, native)
    dweight = jnp.einsum("btic,btc->bti", relu, g_BTC)
    dq = jnp.einsum("btic,bcz->btiz", slope, keys)
    return dq, dweight, jnp.einsum("btic,btiz->bcz", slope, q)


def rows_gradient(q_BTIZ, weight_BTI, rows_BTKZ, g_BTK, *, native: bool = False):
    """The same of `index_scores_of_rows`: (dq, dweight, drows)."""
    q, weight, rows = _float32(q_BTIZ, weight_BTI, rows_BTKZ)
    relu, slope = _slopes(jnp.einsum("btiz,btkz->btik", q, rows), weight, g_BTK, native)
    dweight = jnp.einsum("btik,btk->bti", relu, g_BTK)
    dq = jnp.einsum("btik,btkz->btiz", slope, rows)
    return dq, dweight, jnp.einsum("btik,btiz->btkz", slope, q)


def _slopes(dots, weight, g, native):
    """relu(dots), and the gradient of the dots."""
    relu = jax.nn.relu(_bf16(dots) if native else dots)
    return relu, jnp.where(dots > 0, weight[..., None] * g[:, :, None], 0.0)


def indexer_topk(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, *, native=False):
    """See api.indexer_topk."""
    keys_BCZ = forms.expanded(keys_BCZ)
    scores = index_scores(q_BTIZ, weight_BTI, keys_BCZ, native=native)
    entry = jnp.arange(scores.shape[-1])[None, None]
    visible = (entry >= low_BT[..., None]) & (entry < high_BT[..., None])
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    # Visible ones first, even of score -inf; lexsort is stable.
    order = jnp.lexsort((-scores, ~visible), axis=-1)[..., :topk]
    seen = jnp.take_along_axis(visible, order, axis=-1)
    last = scores.shape[-1]
    ordered = jnp.sort(jnp.where(seen, order, last), axis=-1)
    return jnp.where(ordered == last, -1, ordered).astype(jnp.int32)


def indexer_member(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, *, native=False):
    """See api.indexer_member."""
    chosen = indexer_topk(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, native=native)
    return membership.from_indices(chosen, keys_BCZ.shape[1])
