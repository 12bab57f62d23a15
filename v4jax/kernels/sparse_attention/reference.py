"""Sparse attention as the specification reads: full masks, one softmax, float32. For tests."""

import jax.numpy as jnp


def sparse_attention(
    q_BTNH,
    sink_N,
    *,
    scale,
    window_BSH=None,
    first_BT=None,
    window=0,
    entries_BCH=None,
    low_BT=None,
    high_BT=None,
    chosen_BTK=None,
):
    """See api.sparse_attention; holds [B,T,N,S+C]."""
    keys, masks = [], []
    if window_BSH is not None:
        keys.append(window_BSH)
        masks.append(window_mask(first_BT, window_BSH.shape[1], window))
    if entries_BCH is not None:
        keys.append(entries_BCH)
        masks.append(entry_mask(entries_BCH.shape[1], low_BT, high_BT, chosen_BTK))
    kv_BKH = jnp.concatenate(keys, axis=1).astype(jnp.float32)
    mask_BTK = jnp.concatenate(masks, axis=2)
    scores = jnp.einsum("btnh,bkh->btnk", q_BTNH.astype(jnp.float32), kv_BKH) * scale
    scores = jnp.where(mask_BTK[:, :, None], scores, -jnp.inf)
    sink = jnp.broadcast_to(sink_N[None, None, :, None], (*scores.shape[:3], 1))
    scores = jnp.concatenate([scores, sink], axis=-1)
    p = jnp.exp(scores - scores.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return jnp.einsum("btnk,bkh->btnh", p[..., :-1], kv_BKH)


def window_mask(first_BT, rows, window):
    """[B,T,S]: the rows that a query sees in its window."""
    length = first_BT.shape[1]
    row = jnp.arange(rows)[None, None]
    own = jnp.arange(length)[None, :, None] + rows - length
    return (row >= first_BT[..., None]) & (row <= own) & (row > own - window)


def entry_mask(entries, low_BT, high_BT, chosen_BTK):
    """[B,T,C]: the entries that a query attends to."""
    entry = jnp.arange(entries)[None, None]
    visible = (entry >= low_BT[..., None]) & (entry < high_BT[..., None])
    if chosen_BTK is None:
        return visible
    picked = (chosen_BTK[..., None] == jnp.arange(entries)[None, None, None]).any(2)
    return visible & picked
