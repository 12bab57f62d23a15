"""DSpark as a draft: rings that follow the model, and proposals; `draft` says how it is used."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.dspark import Heads
from v4jax.model.layers import project
from v4jax.reprs import short_repr


@struct.dataclass
class DSparkState:
    """What the draft remembers of B rows.

    Attributes:
      rings: [B,S,W,H], of each stage the rows of the last W positions, the newest last.
      lengths: [B], how many positions have had a row, all that the model has run.
    """

    rings: Any
    lengths: Any

    def __repr__(self) -> str:
        return short_repr(self)


def init_state(model, rows: int) -> DSparkState:
    """Fresh rows."""
    config, dtype = model.config, model.execution().dtype
    shape = (rows, config.draft_layers, config.sliding_window, config.head_dim)
    return DSparkState(rings=jnp.zeros(shape, dtype), lengths=jnp.zeros((rows,), jnp.int32))


def seed(model, variables, state: DSparkState, features_BTX, lengths_B) -> DSparkState:
    """The state after a chunk of a prompt, of which only the last W positions need rows."""
    width = min(features_BTX.shape[1], state.rings.shape[2])
    count = jnp.minimum(lengths_B, width)
    first = lengths_B - count
    rows = jnp.arange(width, dtype=jnp.int32)[None] + first[:, None]
    rows = jnp.minimum(rows, features_BTX.shape[1] - 1)
    features = jnp.take_along_axis(features_BTX, rows[..., None], axis=1)
    skipped = state.replace(lengths=state.lengths + first)
    return commit(model, variables, skipped, features, count)


def commit(model, variables, state: DSparkState, features_BTX, count_B) -> DSparkState:
    """The state with the rows of the next `count` positions."""
    arrays = (features_BTX, state.lengths)
    outputs = model.sharding.spec("batch")
    new_BSTH = sharded.method(model, "draft_rows", variables, arrays, outputs)
    keep = state.rings.shape[2]
    joined = jnp.concatenate([state.rings, new_BSTH.astype(state.rings.dtype)], axis=2)
    take = jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, keep, axis=1))
    return DSparkState(rings=take(joined, count_B), lengths=state.lengths + count_B)


def propose(
    model, variables, state: DSparkState, anchor_B, width: int, pick
) -> tuple[Array, Array]:
    """Drafts [B,width] and the logits of their confidences [B,width], float32.

    Raises:
      InputError: more drafts than the block has places.
    """
    sizes, execution = model.config.dspark, model.execution()
    if not 1 <= width <= sizes.block_size:
        raise InputError(
            f"{width} drafts were asked of a DSpark draft of {sizes.block_size} tokens per round; "
            f"expected 1 to {sizes.block_size}"
        )
    # The block keeps its size however few drafts are wanted: it is not causal.
    noise = jnp.full((anchor_B.shape[0], sizes.block_size - 1), sizes.noise_token_id, jnp.int32)
    tokens = jnp.concatenate([anchor_B[:, None], noise], axis=1)
    y_BTD, logits_BTV, heads = _block(model, variables, tokens, state.rings, state.lengths)
    drafts, confidences, token_B = [], [], anchor_B
    for i in range(width):
        e_BX = heads.before_VX[token_B].astype(execution.dtype)
        bias_BV = project("bx,vx->bv", e_BX, heads.after_VX, execution, quantize_input=False)
        token_B = pick(i, logits_BTV[:, i] + bias_BV).astype(jnp.int32)
        read_BX = jnp.concatenate([y_BTD[:, i], e_BX], axis=-1)
        confidences.append(
            project("bx,ox->bo", read_BX, heads.confidence_1X, execution, quantize_input=False)
        )
        drafts.append(token_B)
    return jnp.stack(drafts, axis=1), jnp.concatenate(confidences, axis=1)


def _block(model, variables, *arrays):
    layout = model.sharding
    heads = Heads(layout.spec(), layout.spec("vocab"), layout.spec())
    outputs = (layout.spec("batch"), layout.spec("batch", None, "vocab"), heads)
    return sharded.method(model, "draft_block", variables, arrays, outputs)
