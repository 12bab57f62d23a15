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

WORD, ALL = 32, 0xFFFFFFFF  # tokens whose permission one word holds, and a word that permits all


class Draws(NamedTuple):
    """How the next tokens of each slot are drawn; numpy arrays of S slots, P places each.

    Attributes:
      active: whether the slot takes part; the others keep all that they have.
      sampling: arrays [S].
      seed: uint32. row, step: as of `Request.seed`; step counts new tokens, that of the first
        place.
      allowed_SPW: uint32, a bit for each token of the vocabulary that may be chosen.
    """

    active: Any
    sampling: Sampling
    seed: Any
    row: Any
    step: Any
    allowed_SPW: Any


class Choice(NamedTuple):
    """The model's tokens at each slot's places [S,P] (-1: logits that are not finite).

    count [S]: how many of them, the first ones, are the answer's: those places' own inputs were
    accepted. logprob [S,P] is each token's; top, top_logprob [S,P,TOP_LOGPROBS] are the likeliest
    tokens', of the distribution before any filter. None where they are not asked for.
    """

    token: Any
    count: Any
    logprob: Any = None
    top: Any = None
    top_logprob: Any = None


def no_draws(slots: int, vocab_size: int, places: int = 1) -> Draws:
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
        allowed_SPW=np.full((slots, places, words(vocab_size)), ALL, np.uint32),
    )


def words(vocab_size: int) -> int:
    """How many words hold a bit for each token."""
    return -(-vocab_size // WORD)


def draw(logits_SPV, draws: Draws, first: int = 0):
    """The tokens [S,P] of places `first`, `first` + 1, ..., before anything is masked."""
    slots, places, vocab = logits_SPV.shape
    keys_X = keys(draws, first, places).reshape(-1)
    flat = logits_SPV.reshape(slots * places, vocab)
    sampling = jax.tree.map(lambda x: jnp.repeat(x, places), draws.sampling)
    return sampling_lib.sample(flat, keys_X, sampling).reshape(slots, places)


def keys(draws: Draws, first: int, places: int):
    """The keys [S,P] of the new tokens of places `first`, `first` + 1, ..."""
    step_SP = draws.step[:, None] + jnp.arange(first, first + places, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(_key, (None, None, 0)))(draws.seed, draws.row, step_SP)


def choose(logits_SPV, draws: Draws, scored: bool) -> Choice:
    """Draws the tokens of all places, one of each slot accepted; `scored`: log-probabilities too.

    A place is drawn with the filters of its slot and the key of its new token, whatever was
    drafted there: so an answer is the same with drafts and without.
    """
    token_SP = draw(only_allowed(logits_SPV, draws.allowed_SPW), draws)
    return chosen(logits_SPV, token_SP, draws, scored)


def chosen(logits_SPV, token_SP, draws: Draws, scored: bool) -> Choice:
    """The choice of these tokens, one of each slot accepted."""
    token_SP = jnp.where(finite(logits_SPV), token_SP, -1)
    count_S = draws.active.astype(jnp.int32)
    if not scored:
        return Choice(token_SP, count_S)
    flat = logits_SPV.reshape(-1, logits_SPV.shape[2])
    scores = logprobs(flat, token_SP.reshape(-1))
    return Choice(token_SP, count_S, *(x.reshape(*token_SP.shape, *x.shape[1:]) for x in scores))


def finite(logits_SPV):
    """Whether a place [S,P] has logits to choose by."""
    return jnp.isfinite(logits_SPV).all(axis=-1)


def _key(seed, row, step):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)


def only_allowed(logits_SPV, allowed_SPW):
    """Minus infinity where a token's bit is not set."""

    def masked(logits_SPV):
        token = jnp.arange(logits_SPV.shape[2], dtype=jnp.int32)
        bits_SPV = allowed_SPW[:, :, token // WORD] >> (token % WORD).astype(jnp.uint32)[None, None]
        return jnp.where(bits_SPV & jnp.uint32(1) > 0, logits_SPV, -jnp.inf)

    free = jnp.all(allowed_SPW == jnp.uint32(ALL))
    return jax.lax.cond(free, lambda x: x, masked, logits_SPV)


def logprobs(logits_XV, token_X):
    """The tokens' log-probabilities, and the likeliest tokens with theirs; see `Choice`."""
    logprob_XV = jax.nn.log_softmax(logits_XV.astype(jnp.float32))
    own_X = jnp.take_along_axis(logprob_XV, jnp.maximum(token_X, 0)[:, None], axis=1)[:, 0]
    top_logprob, top = jax.lax.top_k(logprob_XV, min(TOP_LOGPROBS, logits_XV.shape[1]))
    return own_X, top.astype(jnp.int32), top_logprob
