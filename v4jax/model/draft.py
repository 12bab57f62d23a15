"""Drafts of the tokens to come, for speculative decoding: their state, and how it moves.

The model proposes, `engine.speculate` verifies. A draft of kind "mtp" is the checkpoint's first MTP
block, run as a chain. For every kind:

    state = draft.init_state(model, rows, kind)
    out = model.apply(variables, tokens, cache=..., lengths=..., aux=draft.aux(kind))
    state = draft.seed(model, variables, state, draft.taps(out, kind), tokens, lengths)  # a prompt
    state = draft.begin(model, variables, state, first_token, active)       # its first new token
    drafts, _ = draft.propose(model, variables, state, anchor, width, pick)
    state = draft.commit(model, variables, state, draft.taps(out, kind), following, counts)

Every function is pure and works in `jax.jit` with the model and the kind static. All arrays of a
state have the rows of the batch first, so `jax.tree.map` takes a row out or puts one in; all zeros
is a fresh row. Idle rows take part with a count of 0 and stay as they are, bit for bit.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.reprs import short_repr

KINDS = ("mtp",)
Pick = Callable[[int, Array], Array]


@struct.dataclass
class MTPState:
    """What the MTP chain remembers of B rows.

    Window row t of the block is made of the model's streams at position t and the token at t + 1.

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


def check_kind(config: ModelConfig, kind: str) -> None:
    """Refuses a draft that the model does not have.

    Raises:
      InputError: an unknown kind, or one that the checkpoint brings no weights of.
    """
    if kind not in KINDS:
        raise InputError(f"draft is {kind!r}; expected one of {KINDS}")
    if kind == "mtp" and not config.mtp_layers:
        raise InputError(
            "draft is 'mtp' and the model has no MTP block; load a checkpoint with one "
            "(num_nextn_predict_layers of 1 or more), or leave drafts out"
        )


def aux(kind: str) -> tuple[str, ...]:
    """What a draft asks of every `model.apply`: its `aux`."""
    return ("last_streams",)


def taps(out: Any, kind: str) -> Array:
    """What a draft reads of a call's output, [B,T,...]."""
    return out.streams


def init_state(model: Any, rows: int, kind: str) -> MTPState:
    """The state of `rows` fresh rows.

    Raises:
      InputError: as `check_kind`.
    """
    config, dtype = model.config, model.execution().dtype
    check_kind(config, kind)
    return MTPState(
        window=jnp.zeros((rows, config.sliding_window - 1, config.head_dim), dtype),
        streams=jnp.zeros((rows, config.hc_mult, config.hidden_size), dtype),
        lengths=jnp.zeros((rows,), jnp.int32),
        logits=jnp.zeros((rows, config.vocab_size), jnp.float32),
    )


def seed(
    model: Any, variables: Any, state: MTPState, taps: Array, tokens_BT: Any, lengths_B: Any
) -> MTPState:
    """The state after a chunk of the prompt, in one chunk or any number of them.

    Args:
      taps: of the chunk. tokens_BT, lengths_B: the chunk, as the model read it.
    """
    tokens_BT, lengths_B = (jnp.asarray(x, jnp.int32) for x in (tokens_BT, lengths_B))
    # Streams at t and the token at t + 1: the chunk's tokens follow the streams one place earlier.
    streams = jnp.concatenate([state.streams[:, None], taps], axis=1)
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
    window, *_ = _mtp_rows(model, variables, pairs, following, state.window, begin, count)
    last = jnp.take_along_axis(streams, lengths_B[:, None, None, None], axis=1)[:, 0]
    return state.replace(window=window, streams=last, lengths=state.lengths + lengths_B)


def begin(model: Any, variables: Any, state: MTPState, token_B: Any, active_B: Any) -> MTPState:
    """The state with the token behind the last position, which makes the first draft's logits.

    After a prompt this is the first token that the model chose. In a round it is the last draft.

    Args:
      active_B: which rows move; the others stay as they are.
    """
    token_B, count_B = (jnp.asarray(x).astype(jnp.int32) for x in (token_B, active_B))
    return _advance(model, variables, state, state.streams[:, None], token_B[:, None], count_B)


def propose(
    model: Any, variables: Any, state: MTPState, anchor_B: Any, width: int, pick: Pick
) -> tuple[Array, Array | None]:
    """Drafts of the tokens behind the anchor, int32 [B,width], and no confidences.

    The state is not changed: drafts that are rejected leave no trace.

    Args:
      anchor_B: the newest token of each row, which the state has met and the cache has not.
      width: how many.
      pick: the token of each row, (i, logits [B,V]) -> [B], for draft i = 0, 1, ...
    """
    drafts, everyone = [], jnp.ones(state.lengths.shape, jnp.int32)
    for i in range(width):
        if drafts:
            state = begin(model, variables, state, drafts[-1], everyone)
        drafts.append(pick(i, state.logits).astype(jnp.int32))
    return jnp.stack(drafts, axis=1), None


def commit(
    model: Any, variables: Any, state: MTPState, taps: Array, tokens_BT: Any, count_B: Any
) -> MTPState:
    """The state after a round: with the positions that are kept, and the next first draft's logits.

    Args:
      taps: of the verification, from the anchor on, [B,T,...].
      tokens_BT: the token behind each of these positions: accepted drafts, then the next anchor.
      count_B: how many positions are kept (accepted drafts and the anchor); 0 for an idle row.
    """
    tokens_BT, count_B = (jnp.asarray(x, jnp.int32) for x in (tokens_BT, count_B))
    return _advance(model, variables, state, taps, tokens_BT, count_B)


def _advance(model, variables, state, streams_BTMD, tokens_BT, count_B):
    """The state with `count` more rows, made of these streams and tokens."""
    begin = jnp.maximum(state.lengths - 1, 0)
    pairs = (streams_BTMD, tokens_BT, state.window, begin, count_B)
    window, streams, logits = _mtp_rows(model, variables, *pairs)
    moved = count_B > 0
    return MTPState(
        window=window,
        streams=jnp.where(moved[:, None, None], streams, state.streams),
        lengths=state.lengths + count_B,
        logits=jnp.where(moved[:, None], logits, state.logits),
    )


def _mtp_rows(model, variables, *arrays):
    layout = model.sharding
    outputs = (layout.spec("batch"), layout.spec("batch"), layout.spec("batch", "vocab"))
    return _run(model, "mtp_rows", variables, arrays, outputs)


def _run(model, method, variables, arrays, out_specs):
    """A method of `Network` on the model's mesh; the rows of all arrays are the batch's."""
    layout = model.sharding
    body = functools.partial(model.network().apply, method=method)
    if layout.mesh is None:
        return body({name: variables[name] for name in ("params", "buffers")}, *arrays)
    if layout.axes("sequence"):
        raise InputError(
            f"a draft came with strategy {layout.strategy.name!r}, which cuts rows into parts; "
            "expected one whose shards hold whole rows, such as 'decode'"
        )
    layout.check_divides({"batch": len(arrays[0])})
    specs, row = sharded.variable_specs(model), layout.spec("batch")
    return jax.shard_map(
        body,
        mesh=layout.mesh,
        in_specs=(specs, *(row,) * len(arrays)),
        out_specs=out_specs,
        check_vma=False,
    )({name: variables[name] for name in specs}, *arrays)
