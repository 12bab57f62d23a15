"""Drafts of the tokens to come, for speculative decoding: their state, and how it moves.

The model proposes, `engine.speculate` verifies. A draft of kind "mtp" is the checkpoint's first MTP
block, run as a chain (`mtp_draft`); one of kind "dspark" is a block of its own that proposes
several tokens at once (`dspark_draft`). For both:

    state = draft.init_state(model, rows, kind)
    out = model.apply(variables, tokens, cache=..., lengths=..., aux=draft.aux(kind))
    state = draft.seed(model, variables, state, draft.taps(out, kind), tokens, lengths)  # a prompt
    state = draft.begin(model, variables, state, first_token, active)       # its first new token
    drafts, confidences = draft.propose(model, variables, state, anchor, width, pick)
    state = draft.commit(model, variables, state, draft.taps(out, kind), following, counts)

Every function is pure and works in `jax.jit` with the model and the kind static. All arrays of a
state have the rows of the batch first, so `jax.tree.map` takes a row out or puts one in; all zeros
is a fresh row. Idle rows take part with a count of 0 and stay as they are, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.model import dspark_draft, mtp_draft
from v4jax.model.dspark_draft import DSparkState
from v4jax.model.mtp_draft import MTPState

KINDS = ("mtp", "dspark")
State = MTPState | DSparkState
Pick = Callable[[int, Array], Array]


def kinds(config: ModelConfig) -> tuple[str, ...]:
    """The drafts that a model has, the one to prefer first."""
    there = {"dspark": config.dspark is not None, "mtp": bool(config.mtp_layers)}
    return tuple(kind for kind, has in there.items() if has)


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
    if kind == "dspark" and config.dspark is None:
        carried = f", and its {config.draft_layers} draft blocks" if config.draft_layers else ""
        raise InputError(
            f"draft is 'dspark' and the model has no DSpark draft: config.json{carried} lack "
            "dspark_block_size, dspark_markov_rank, dspark_noise_token_id and "
            "dspark_target_layer_ids; load a checkpoint with them, or leave drafts out"
        )


def aux(kind: str) -> tuple[str, ...]:
    """What a draft asks of every `model.apply`: its `aux`."""
    return ("last_streams",) if kind == "mtp" else ("features",)


def taps(out: Any, kind: str) -> Array:
    """What a draft reads of a call's output, [B,T,...]."""
    return out.streams if kind == "mtp" else out.aux["features"]


def init_state(model: Any, rows: int, kind: str) -> State:
    """The state of `rows` fresh rows.

    Raises:
      InputError: as `check_kind`.
    """
    check_kind(model.config, kind)
    return (mtp_draft if kind == "mtp" else dspark_draft).init_state(model, rows)


def seed(
    model: Any, variables: Any, state: State, taps: Array, tokens_BT: Any, lengths_B: Any
) -> State:
    """The state after a chunk of the prompt, in one chunk or any number of them.

    Args:
      taps: of the chunk. tokens_BT, lengths_B: the chunk, as the model read it.
    """
    tokens_BT, lengths_B = (jnp.asarray(x, jnp.int32) for x in (tokens_BT, lengths_B))
    if isinstance(state, MTPState):
        return mtp_draft.seed(model, variables, state, taps, tokens_BT, lengths_B)
    return dspark_draft.seed(model, variables, state, taps, lengths_B)


def begin(model: Any, variables: Any, state: State, token_B: Any, active_B: Any) -> State:
    """The state with the first token that the model chose after a prompt.

    Args:
      active_B: which rows begin; the others stay as they are.
    """
    if isinstance(state, DSparkState):
        return state
    token_B, active_B = jnp.asarray(token_B, jnp.int32), jnp.asarray(active_B)
    return mtp_draft.begin(model, variables, state, token_B, active_B)


def propose(
    model: Any, variables: Any, state: State, anchor_B: Any, width: int, pick: Pick
) -> tuple[Array, Array | None]:
    """Drafts of the tokens behind the anchor, int32 [B,width], and what their confidences are of.

    The state is not changed: drafts that are rejected leave no trace.

    Args:
      anchor_B: the newest token of each row, which the cache does not hold yet.
      width: how many; of a DSpark draft at most its block.
      pick: the token of each row, (i, logits [B,V] float32) -> [B], for draft i = 0, 1, ...

    Returns:
      The drafts; and float32 [B,width] whose sigmoid estimates that a draft is accepted if all
      before it are (None for MTP, which has no such head).
    """
    if isinstance(state, MTPState):
        return mtp_draft.propose(model, variables, state, width, pick), None
    anchor_B = jnp.asarray(anchor_B, jnp.int32)
    return dspark_draft.propose(model, variables, state, anchor_B, width, pick)


def commit(
    model: Any, variables: Any, state: State, taps: Array, tokens_BT: Any, count_B: Any
) -> State:
    """The state after a round, with the positions that are kept.

    Args:
      taps: of the verification, from the anchor on, [B,T,...].
      tokens_BT: the token behind each of these positions: accepted drafts, then the next anchor.
      count_B: how many positions are kept (the anchor and accepted drafts); 0 for an idle row.
    """
    tokens_BT, count_B = (jnp.asarray(x, jnp.int32) for x in (tokens_BT, count_B))
    if isinstance(state, MTPState):
        return mtp_draft.commit(model, variables, state, taps, tokens_BT, count_B)
    return dspark_draft.commit(model, variables, state, taps, count_B)
