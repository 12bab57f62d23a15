"""What the indexer's choice keeps of dense attention: over all CSA layers, for a prompt's end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def recall(model, variables, tokens) -> dict[str, float]:
    """Compares the last token's chosen entries with the attention to all entries it may see.

    The weights of dense attention are a softmax over the visible entries in each head, summed over
    the heads: the window and the sink are left out, since the indexer has no say in them.

    Args:
      tokens: ids of one prompt, of 2 or more.

    Returns:
      "score": the share of the weights that lies on chosen entries, the mean over layers, with
      "worst_layer", the least of them; "overlap": which share of the most attended entries is
      chosen; "visible_entries", of which "chosen_entries" at most are chosen.
    """
    ids = jnp.asarray(tokens, jnp.int32)[None]
    cache = model.init_cache(1, len(tokens))
    cache = _read(model, variables, ids[:, :-1], cache)
    chosen, q, entries = jax.device_get(_look(model, variables, ids[:, -1:], cache))
    found = []
    for layer in sorted(chosen):
        ratio = model.config.layers[layer].ratio
        count = len(tokens) // ratio
        if count:
            kept = chosen[layer][0, 0]
            kept = kept[(kept >= 0) & (kept < count)]
            weights = _dense(q[layer][0, 0], entries[layer][0, :count], model.config.head_dim)
            found.append((*_kept(weights, kept), count, len(kept)))
    if not found:
        return {"score": 1.0, "overlap": 1.0, "worst_layer": 1.0}
    share, overlap, count, most = (np.array(each, np.float64) for each in zip(*found, strict=True))
    return {
        "score": float(share.mean()),
        "worst_layer": float(share.min()),
        "overlap": float(overlap.mean()),
        "visible_entries": int(count.max()),
        "chosen_entries": int(most.max()),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(model, variables, ids_BT, cache):
    return model.apply(variables, ids_BT, cache=cache, logits="last").cache


@functools.partial(jax.jit, static_argnums=0)
def _look(model, variables, ids_BT, cache):
    out = model.apply(
        variables, ids_BT, cache=cache, logits="last", aux=("chosen", "attention")
    ).aux
    chosen = out.get("chosen", {})
    return chosen, *({layer: out[name][layer] for layer in chosen} for name in ("q", "entries"))


def _dense(q_NH, entries_CH, width) -> np.ndarray:
    """Weights of all entries [C], summed over heads."""
    scores = q_NH.astype(np.float32) @ entries_CH.astype(np.float32).T * width**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).sum(0)


def _kept(weights, kept):
    """The share of the weights on the entries that are kept, and of the heaviest that are."""
    heaviest = np.argsort(-weights, kind="stable")[: len(kept)]
    overlap = len(set(heaviest.tolist()) & set(kept.tolist())) / max(len(kept), 1)
    return float(weights[kept].sum() / weights.sum()), overlap
