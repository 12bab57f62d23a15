"""Sparse attention as the specification reads: full masks, one softmax, float32. For tests."""

import jax
import jax.numpy as jnp

from v4jax.kernels import membership
from v4jax.kernels.sparse_attention.entries import expanded


def sparse_attention(plan, q_BTNH, sink_N, window_BSH, entries_BCH, visible):
    """See api.sparse_attention: output and log-sum-exp; holds [B,T,N,S+C]."""
    keys, masks = [], []
    if window_BSH is not None:
        keys.append(window_BSH)
        masks.append(window_mask(visible.first, window_BSH.shape[1], plan.window))
    if entries_BCH is not None:
        keys.append(expanded(entries_BCH))
        masks.append(entry_mask(entries_BCH.shape[1], visible))
    kv_BKH = jnp.concatenate(keys, axis=1).astype(jnp.float32)
    mask_BTK = jnp.concatenate(masks, axis=2)
    scores = jnp.einsum("btnh,bkh->btnk", q_BTNH.astype(jnp.float32), kv_BKH) * plan.scale
    scores = jnp.where(mask_BTK[:, :, None], scores, -jnp.inf)
    sink = jnp.broadcast_to(sink_N[None, None, :, None], (*scores.shape[:3], 1))
    scores = jnp.concatenate([scores, sink], axis=-1)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.exp(scores - lse[..., None])
    out = jnp.einsum("btnk,bkh->btnh", p[..., :-1], kv_BKH)
    return out.astype(q_BTNH.dtype), lse


def window_mask(first_BT, rows, window):
    """[B,T,S]: the rows that a query sees in its window."""
    length = first_BT.shape[1]
    row = jnp.arange(rows)[None, None]
    own = jnp.arange(length)[None, :, None] + rows - length
    return (row >= first_BT[..., None]) & (row <= own) & (row > own - window)


def entry_mask(entries, visible):
    """[B,T,C]: the entries that a query attends to."""
    entry = jnp.arange(entries)[None, None]
    mask = (entry >= visible.low[..., None]) & (entry < visible.high[..., None])
    if visible.member is not None:
        return mask & membership.unpack(visible.member, entries)
    if visible.chosen is None:
        return mask
    picked = (visible.chosen[..., None] == jnp.arange(entries)[None, None, None]).any(2)
    return mask & picked
