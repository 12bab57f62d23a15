"""The MTP block as a draft: a chain whose window is its own; `draft` says how it is used.

Window row t of the block is made of the model's streams at position t and the token at t + 1.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from v4jax.model import sharded
from v4jax.reprs import short_repr


@struct.dataclass
class MTPState:
    """What the chain remembers of B rows.

    Attributes:
      window: the last W - 1 rows [B,W-1,H], the newest last.
      streams: [B,M,D], what the next row is made of: the model's streams at the last position of
        which no row is made yet, or the block's own output, which stands in for them.
      lengths: [B], how many positions have streams, the stand-in included: the next row is that of
        position lengths - 1. 0: the row has read nothing.
      logits: [B,V] float32 of the newest row, which propose the next draft; of no meaning before
        `begin`.
    """

    window: Any
    streams: Any
    lengths: Any
    logits: Any

    def __repr__(self) -> str:
        return short_repr(self)


def init_state(model, rows: int) -> MTPState:
    """Fresh rows."""
    config, dtype = model.config, model.execution().dtype
    return MTPState(
        window=jnp.zeros((rows, config.sliding_window - 1, config.head_dim), dtype),
        streams=jnp.zeros((rows, config.hc_mult, config.hidden_size), dtype),
        lengths=jnp.zeros((rows,), jnp.int32),
        logits=jnp.zeros((rows, config.vocab_size), jnp.float32),
    )


def seed(model, variables, state: MTPState, streams_BTMD, tokens_BT, lengths_B) -> MTPState:
    """The state after a chunk of a prompt; the row of its last position needs the next token."""
    # Streams at t and the token at t + 1: the chunk's tokens follow the streams one place earlier.
    streams = jnp.concatenate([state.streams[:, None], streams_BTMD], axis=1)
    fresh = (state.lengths == 0).astype(jnp.int32)
    new = jnp.maximum(lengths_B - fresh, 0)
    # Older rows than the window keeps need not be made.
    width = min(tokens_BT.shape[1], max(state.window.shape[1], 1))
    count = jnp.minimum(new, width)
    first = lengths_B - count
    rows = jnp.arange(width, dtype=jnp.int32)[None] + first[:, None]
    rows = jnp.minimum(rows, tokens_BT.shape[1] - 1)
    pairs = jnp.take_along_axis(streams, rows[..., None, None], axis=1)
    following = jnp.take_along_axis(tokens_BT, rows, axis=1)
    begin = jnp.maximum(state.lengths - 1 + first, 0)
    window, *_ = _rows(model, variables, pairs, following, state.window, begin, count)
    last = jnp.take_along_axis(streams, lengths_B[:, None, None, None], axis=1)[:, 0]
    return state.replace(window=window, streams=last, lengths=state.lengths + lengths_B)


def begin(model, variables, state: MTPState, token_B, active_B) -> MTPState:
    """The state with one more row, of the token behind the last position."""
    pair = state.streams[:, None], token_B[:, None]
    return commit(model, variables, state, *pair, active_B.astype(jnp.int32))


def propose(model, variables, state: MTPState, width: int, pick) -> Array:
    """Drafts [B,width]: the block's own output stands in for the model's streams."""
    drafts, everyone = [], jnp.ones(state.lengths.shape, jnp.int32)
    for i in range(width):
        if drafts:
            state = begin(model, variables, state, drafts[-1], everyone)
        drafts.append(pick(i, state.logits).astype(jnp.int32))
    return jnp.stack(drafts, axis=1)


def commit(model, variables, state: MTPState, streams_BTMD, tokens_BT, count_B) -> MTPState:
    """The state with `count` more rows, and the logits of the last of them."""
    begin = jnp.maximum(state.lengths - 1, 0)
    pairs = (streams_BTMD, tokens_BT, state.window, begin, count_B)
    window, streams, logits = _rows(model, variables, *pairs)
    moved = count_B > 0
    return MTPState(
        window=window,
        streams=jnp.where(moved[:, None, None], streams, state.streams),
        lengths=state.lengths + count_B,
        logits=jnp.where(moved[:, None], logits, state.logits),
    )


def _rows(model, variables, *arrays):
    layout = model.sharding
    outputs = (layout.spec("batch"), layout.spec("batch"), layout.spec("batch", "vocab"))
    return sharded.method(model, "mtp_rows", variables, arrays, outputs)
