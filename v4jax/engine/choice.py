"""The choice of each slot's next token, inside the compiled programs.

Every slot is drawn with its own setting and its own key, so that neither its place nor its
neighbours change a token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.engine.request import TOP_LOGPROBS
from v4jax.infer import sampling as sampling_lib
from v4jax.infer.sampling import Sampling

WORD = 32  # tokens whose permission one word holds


class Draws(NamedTuple):
    """How the next token of each slot is drawn; numpy arrays of S slots.

    Attributes:
      active: whether the slot takes part; the others keep all that they have.
      sampling: arrays [S].
      seed: uint32. row, step: as of `Request.seed`; step counts new tokens.
      allowed_SW: uint32, a bit for each token of the vocabulary that may be chosen.
    """

    active: Any
    sampling: Sampling
    seed: Any
    row: Any
    step: Any
    allowed_SW: Any


class Choice(NamedTuple):
    """The next token of each slot [S] (-1: logits that are not finite), and log-probabilities.

    logprob [S] is the token's; top, top_logprob [S,TOP_LOGPROBS] are the likeliest tokens', of the
    distribution before any filter. None where they are not asked for.
    """

    token: Any
    logprob: Any = None
    top: Any = None
    top_logprob: Any = None


def no_draws(slots: int, vocab_size: int) -> Draws:
    """Draws in which no slot takes part."""
    return Draws(
        active=np.zeros(slots, bool),
        sampling=Sampling(
            np.zeros(slots, np.float32),
            np.zeros(slots, np.int32),
            np.ones(slots, np.float32),
            np.zeros(slots, np.float32),
        ),
        seed=np.zeros(slots, np.uint32),
        row=np.zeros(slots, np.int32),
        step=np.zeros(slots, np.int32),
        allowed_SW=np.full((slots, -(-vocab_size // WORD)), 0xFFFFFFFF, np.uint32),
    )


def choose(logits_SV, draws: Draws, scored: bool) -> Choice:
    """Draws a token for each slot; `scored`: with log-probabilities."""
    keys_S = jax.vmap(_key)(draws.seed, draws.row, draws.step)
    legal_SV = only_allowed(logits_SV, draws.allowed_SW)
    token_S = sampling_lib.sample(legal_SV, keys_S, draws.sampling)
    finite_S = jnp.isfinite(logits_SV).all(axis=-1)
    if not scored:
        return Choice(jnp.where(finite_S, token_S, -1))
    return Choice(jnp.where(finite_S, token_S, -1), *logprobs(logits_SV, token_S))


def _key(seed, row, step):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)


def only_allowed(logits_SV, allowed_SW):
    """Minus infinity where a token's bit is not set."""

    def masked(logits_SV):
        token = jnp.arange(logits_SV.shape[1], dtype=jnp.int32)
        words_SV = allowed_SW[:, token // WORD]
        bits_SV = (words_SV >> (token % WORD).astype(jnp.uint32)[None]) & jnp.uint32(1)
        return jnp.where(bits_SV > 0, logits_SV, -jnp.inf)

    free = jnp.all(allowed_SW == jnp.uint32(0xFFFFFFFF))
    return jax.lax.cond(free, lambda x: x, masked, logits_SV)


def logprobs(logits_XV, token_X):
    """The tokens' log-probabilities, and the likeliest tokens with theirs; see `Choice`."""
    logprob_XV = jax.nn.log_softmax(logits_XV.astype(jnp.float32))
    own_X = jnp.take_along_axis(logprob_XV, token_X[:, None], axis=1)[:, 0]
    top_logprob, top = jax.lax.top_k(logprob_XV, min(TOP_LOGPROBS, logits_XV.shape[1]))
    return own_X, top.astype(jnp.int32), top_logprob
