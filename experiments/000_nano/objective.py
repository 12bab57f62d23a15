"""What the training minimises, and the gradients of it.

The main model learns from the next token, the MTP block's token after that and a small loss for
even experts. The indexer learns from a loss of its own alone: top-k passes no gradient, so its
scores are drawn towards the attention that the layer would pay to each compressed entry.
"""

import jax
import jax.numpy as jnp

MTP_WEIGHT = 0.3
BALANCE_WEIGHT = 1e-4
INDEXED_ROWS = 2  # rows of the batch that the indexer learns from: enough, and a quarter the cost
WANTED = ("router_experts", "router_scores", "index_scores", "attention")


def cross_entropy(logits_BTV, targets_BT):
    """Nats of every target, [B,T]."""
    right = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - right


def gradients(model, params, buffers, rows_BT):
    """Gradients like params, and what to note down.

    Args:
      rows_BT: ids; each but the first is predicted from those before it.

    Returns:
      The gradients; {"load": {layer: [E]}} and the losses by name.
    """

    def losses(params):
        out = model.apply(
            {"params": params, "buffers": buffers}, rows_BT[:, :-1], mtp=True, aux=WANTED
        )
        text = cross_entropy(out.logits, rows_BT[:, 1:]).mean()
        further = cross_entropy(out.mtp_logits[0], rows_BT[:, 2:]).mean()
        balance, loads = balance_losses(model.config, out.aux)
        index, uniform = index_losses(model.config, params, out.aux)
        noted = {"loss": text, "mtp": further, "index": index, "index_uniform": uniform}
        return (text + MTP_WEIGHT * further + BALANCE_WEIGHT * balance, index), (noted, loads)

    _, pull_back, (noted, loads) = jax.vjp(losses, params, has_aux=True)
    (of_text,), (of_index,) = pull_back((1.0, 0.0)), pull_back((0.0, 1.0))

    def own(path, text, index):
        return index if any(step.key == "indexer" for step in path) else text

    return jax.tree_util.tree_map_with_path(own, of_text, of_index), noted, loads


def balance_losses(config, aux):
    """sum_e f_e P_e a sequence, averaged, over the score-routed layers; and each layer's load."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    total, loads = 0.0, {}
    for layer, chosen_BTK in aux["router_experts"].items():
        if config.layers[layer].routing != "score":
            continue
        picked_BTE = jax.nn.one_hot(chosen_BTK, experts).sum(2)
        scores = aux["router_scores"][layer]
        share_BE = (scores / scores.sum(-1, keepdims=True)).mean(1)
        total += (picked_BTE.mean(1) * (experts / k) * share_BE).sum(-1).mean()
        loads[layer] = picked_BTE.sum((0, 1))
    return total, loads


def index_losses(config, params, aux):
    """KL(teacher || indexer) averaged over the CSA layers, and the KL to a uniform choice."""
    found = []
    for layer, scores_BTC in aux["index_scores"].items():
        q, kv, entries, scores = (
            x[:INDEXED_ROWS]
            for x in (aux["q"][layer], aux["kv"][layer], aux["entries"][layer], scores_BTC)
        )
        sink_N = params[f"layers_{layer}"]["block_0"]["attn"]["attn_sink"]
        length, ratio = q.shape[1], config.layers[layer].ratio
        seen_TC = jnp.arange(scores.shape[2])[None] < ((jnp.arange(length) + 1) // ratio)[:, None]
        teacher = jax.lax.stop_gradient(
            entry_attention(q, kv, entries, sink_N, seen_TC, config.sliding_window)
        )
        found.append(_divergences(teacher, scores, seen_TC))
    return tuple(sum(parts) / len(parts) for parts in zip(*found, strict=True))


def entry_attention(q_BTNH, kv_BTH, entries_BCH, sink_N, seen_TC, window):
    """What all heads together pay to each entry in the joint softmax, summing to 1: [B,T,C]."""
    scale = q_BTNH.shape[-1] ** -0.5
    age_TS = jnp.arange(kv_BTH.shape[1])[:, None] - jnp.arange(kv_BTH.shape[1])[None]
    near_TS = (age_TS >= 0) & (age_TS < window)
    near = jnp.einsum("btnh,bsh->btns", q_BTNH, kv_BTH) * scale
    near = jnp.where(near_TS[None, :, None], near, -jnp.inf)
    far = jnp.einsum("btnh,bch->btnc", q_BTNH, entries_BCH) * scale
    far = jnp.where(seen_TC[None, :, None], far, -jnp.inf)
    sink = jnp.broadcast_to(sink_N[None, None, :, None], (*near.shape[:3], 1))
    paid = jax.nn.softmax(jnp.concatenate([far, near, sink], axis=-1), axis=-1)
    paid_BTC = paid[..., : far.shape[-1]].sum(2)
    return paid_BTC / jnp.maximum(paid_BTC.sum(-1, keepdims=True), 1e-20)


def _divergences(teacher_BTC, scores_BTC, seen_TC):
    """KL of the softmax of the scores, and of a uniform choice, a query that sees an entry."""
    lowest = jnp.finfo(jnp.float32).min
    student = jax.nn.log_softmax(jnp.where(seen_TC[None], scores_BTC, lowest), axis=-1)
    uniform = -jnp.log(jnp.maximum(seen_TC.sum(-1), 1.0))
    surprise = jnp.where(teacher_BTC > 0, jnp.log(jnp.maximum(teacher_BTC, 1e-20)), 0.0)
    student = jnp.where(seen_TC[None], student, 0.0)
    queries = teacher_BTC.shape[0] * seen_TC.any(-1).sum()

    def divergence(guess):
        return (teacher_BTC * (surprise - guess)).sum() / queries

    return divergence(student), divergence(uniform[None, :, None])
