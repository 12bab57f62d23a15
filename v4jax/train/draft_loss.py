"""What training a DSpark draft minimises: its distance from the model's own predictions.

The model, its embedding and its head stay as they are. In every row some tokens are anchors. Each
begins a block as decoding has it: the anchor and noise, behind the ring rows of the tokens before
the anchor. Blocks do not see each other, and a slot's Markov input is the true token before it.

Parts are sums over slots, divided by counts of the whole batch: in any number of parts the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.context import document_starts
from v4jax.model.layers import project
from v4jax.model.transformer import Transformer
from v4jax.train.batch import Batch

TRAINED = "^draft_"
ALL_ELSE = "^(?!draft_)"  # a pattern of every other parameter


@dataclasses.dataclass(frozen=True)
class DraftLoss:
    """How a DSpark draft learns; the weights are those that its authors published.

    Attributes:
      anchors: blocks per row, at most.
      decay: g of the weight exp(-k / g) of slot k; None for the block's size.
      cross_entropy: weight of the next token's nats. distance: of the L1 distance between the
        draft's distribution and the model's. confidence: of the confidence head's cross-entropy.
    """

    anchors: int = 512
    decay: float | None = None
    cross_entropy: float = 0.1
    distance: float = 0.9
    confidence: float = 1.0

    def __post_init__(self):
        if self.anchors < 1:
            raise InputError(f"draft.anchors is {self.anchors}; expected 1 or more")
        if self.decay is not None and not 0 < self.decay < float("inf"):
            raise InputError(f"draft.decay is {self.decay}; expected a positive number, or None")
        for name in ("cross_entropy", "distance", "confidence"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"draft.{name} is {value}; expected 0 or more")


@struct.dataclass
class Counts:
    """What the sums are divided by.

    weight: of all slots that count. slots_K: how many of them at each place. blocks: those whose
    slots all count.
    """

    weight: Any
    slots_K: Any
    blocks: Any


def slots(batch: Batch, block: int) -> tuple[Array, Array]:
    """Of every block the row's place of each slot [B,A,K], and whether the slot counts.

    A slot counts while the targets of all slots up to it lie in the row, the document, the mask.
    """
    anchor_BA1 = jnp.asarray(batch.anchors_BA)[..., None]
    length = batch.tokens_BT.shape[1]
    place_BAK = anchor_BA1 + jnp.arange(block, dtype=jnp.int32)[None, None]
    at_BAK = jnp.clip(place_BAK, 0, length - 1)
    counts = _take(batch.weights_BTJ[..., 0], at_BAK) > 0
    counts &= (anchor_BA1 >= 0) & (place_BAK < length)
    return at_BAK, jnp.cumprod(counts.astype(jnp.int32), axis=-1) > 0


def count(batch: Batch, block: int, options: DraftLoss) -> Counts:
    """The counts of a whole batch, in however many parts it is computed."""
    counted = slots(jax.tree.map(jnp.asarray, batch), block)[1].astype(jnp.float32)
    slots_K = counted.sum((0, 1))
    return Counts(jnp.sum(slots_K * _weights(block, options)), slots_K, counted[..., -1].sum())


def loss(
    model: Transformer,
    variables: dict[str, Any],
    batch: Batch,
    options: DraftLoss,
    counts: Counts,
    *,
    dense: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """The loss to minimise and the figures of `means`; only draft_* get gradients.

    Args:
      batch: rows with anchors, or a part of them. counts: those of the whole batch.
      dense: the model's CSA layers attend to every visible entry.
    """
    return means(sums(model, variables, batch, options, dense=dense), counts, options)


def means(of: dict[str, Any], counts: Counts, options: DraftLoss) -> tuple[Array, dict[str, Any]]:
    """The loss and its parts, of the sums of a batch.

    Returns:
      The loss; and by name "loss", "cross_entropy", "distance", "confidence"; "acceptance_1", ...,
      the probability that coupled sampling accepts the draft of that place if it accepts those
      before; "expected_tau", the tokens per round of a whole block; "confidence_bias" and
      "confidence_error", what a confidence differs by from its acceptance, and its absolute value.
    """
    parts = {
        name: _mean(of[name], counts.weight) for name in ("cross_entropy", "distance", "confidence")
    }
    objective = sum(getattr(options, name) * part for name, part in parts.items())
    noted = {"loss": objective, **parts}
    accepted_K = _mean(of["acceptance"], counts.slots_K)
    noted |= {f"acceptance_{k + 1}": accepted_K[k] for k in range(accepted_K.shape[0])}
    noted["expected_tau"] = _mean(of["tau"], counts.blocks)
    every = jnp.sum(counts.slots_K)
    noted |= {f"confidence_{name}": _mean(of[name], every) for name in ("bias", "error")}
    return objective, noted


def sums(
    model: Transformer,
    variables: dict[str, Any],
    batch: Batch,
    options: DraftLoss,
    *,
    dense: bool = False,
) -> dict[str, Array]:
    """What `means` divides: sums over the slots that count; "acceptance" has one for each place."""
    batch = jax.tree.map(jnp.asarray, batch)
    variables = _frozen(variables)
    at_BAK, counted = slots(batch, model.config.dspark.block_size)
    target_XKV, features_BTX = _target(model, variables, batch, at_BAK, dense)
    draft_XKV, confidence_XK = _blocks(model, variables, batch, features_BTX, at_BAK)
    counted_XK = counted.reshape(confidence_XK.shape).astype(jnp.float32)
    label_XK1 = _take(batch.targets_BTJ[..., 0], at_BAK).reshape(*counted_XK.shape, 1)
    nats_XK = -jnp.take_along_axis(draft_XKV, label_XK1, axis=-1)[..., 0]
    distance_XK = jnp.sum(jnp.abs(jnp.exp(draft_XKV) - jnp.exp(target_XKV)), axis=-1)
    accepted_XK = jax.lax.stop_gradient(1 - distance_XK / 2)
    # The binary cross-entropy of a logit s and a probability a: softplus(s) - a s.
    sure_XK = jax.nn.softplus(confidence_XK) - accepted_XK * confidence_XK
    off_XK = jax.nn.sigmoid(confidence_XK) - accepted_XK
    weight_XK = counted_XK * _weights(counted_XK.shape[1], options)[None]
    survival_X = jnp.sum(jnp.cumprod(accepted_XK, axis=-1), axis=-1)
    return {
        "cross_entropy": jnp.sum(weight_XK * nats_XK),
        "distance": jnp.sum(weight_XK * distance_XK),
        "confidence": jnp.sum(weight_XK * sure_XK),
        "acceptance": jnp.sum(counted_XK * accepted_XK, axis=0),
        "tau": jnp.sum(counted_XK[:, -1] * (1 + survival_X)),
        "bias": jnp.sum(counted_XK * off_XK),
        "error": jnp.sum(counted_XK * jnp.abs(off_XK)),
    }


def _frozen(variables):
    """Variables through which gradients reach the draft alone."""
    params = {
        name: child if name.startswith("draft_") else jax.lax.stop_gradient(child)
        for name, child in variables["params"].items()
    }
    return {"params": params, "buffers": variables["buffers"]}


def _target(model, variables, batch, at_BAK, dense):
    """The model's log-probabilities at every slot [X,K,V], and what the draft reads of it."""
    out = model.apply(
        variables,
        batch.tokens_BT,
        segment_ids=batch.segment_ids_BT,
        logits="normed",
        dense=dense,
        aux=("features",),
    )
    out = jax.lax.stop_gradient(out)
    head = variables["params"]["head"]["weight"].astype(jnp.float32)
    y_BAKD = _take(out.normed, at_BAK).astype(jnp.float32)
    y_XKD = y_BAKD.reshape(-1, *y_BAKD.shape[2:])
    logits = jnp.einsum("xkd,vd->xkv", y_XKD, head)
    return jax.nn.log_softmax(logits), out.aux["features"]


def _blocks(model, variables, batch, features_BTX, at_BAK):
    """The draft's log-probabilities [X,K,V] and logits of its confidences [X,K]; X = all blocks."""
    config, execution = model.config, model.execution()
    block = at_BAK.shape[-1]
    position_BT = _positions(batch)
    arrays = (features_BTX, position_BT)
    rows_BSTH = sharded.method(model, "draft_rows_at", variables, arrays, None)
    anchor_BA = at_BAK[..., 0]
    rings_XSWH = _rings(rows_BSTH, anchor_BA, config.sliding_window)
    length_X = jnp.take_along_axis(position_BT, anchor_BA, axis=1).reshape(-1)
    known_XK = _take(batch.tokens_BT, at_BAK).reshape(-1, block)
    # Decoding knows the anchor alone.
    noise = jnp.full_like(known_XK[:, 1:], config.dspark.noise_token_id)
    tokens_XK = jnp.concatenate([known_XK[:, :1], noise], axis=1)
    arrays = (tokens_XK, rings_XSWH, length_X)
    y_XKD, logits_XKV, heads = sharded.method(model, "draft_block", variables, arrays, None)
    e_XKX = heads.before_VX[known_XK].astype(execution.dtype)
    options = {"execution": execution, "quantize_input": False}
    bias_XKV = project("bkx,vx->bkv", e_XKX, heads.after_VX, **options)
    read_XKX = jnp.concatenate([y_XKD, e_XKX], axis=-1)
    confidence_XK1 = project("bkx,ox->bko", read_XKX, heads.confidence_1X, **options)
    return jax.nn.log_softmax(logits_XKV + bias_XKV), confidence_XK1[..., 0]


def _positions(batch):
    """Every token's position in its document [B,T]."""
    row = jnp.arange(batch.tokens_BT.shape[1], dtype=jnp.int32)[None]
    if batch.segment_ids_BT is None:
        return jnp.broadcast_to(row, batch.tokens_BT.shape)
    return row - document_starts(batch.segment_ids_BT)


def _rings(rows_BSTH, anchor_BA, window):
    """The rows of the `window` tokens before each anchor, the newest last: [X,S,W,H].

    Those before its document are another's; a block masks them by its length.
    """
    place = anchor_BA[..., None] - window + jnp.arange(window, dtype=jnp.int32)[None, None]
    rows_BTSH = jnp.swapaxes(rows_BSTH, 1, 2)
    rings = jnp.swapaxes(_take(rows_BTSH, jnp.maximum(place, 0)), 2, 3)
    return rings.reshape(-1, *rings.shape[2:])


def _take(x_BTX, at_BAK):
    """Each row's entries at given places: [B,A,K,...]."""
    return jax.vmap(lambda x, at: x[at])(x_BTX, at_BAK)


def _weights(block, options):
    g = block if options.decay is None else options.decay
    return jnp.exp(-jnp.arange(block, dtype=jnp.float32) / g)


def _mean(total, number):
    """total / number; 0 where there is nothing to take the mean of."""
    return jnp.where(number > 0, total / jnp.where(number > 0, number, 1.0), 0.0)
