"""Which drafts of a round are kept, and which token comes behind them (inference.md, 3.2 to 3.4).

Two rules; under both the answer has the model's distribution, and a greedy answer its best tokens.

* coupled: the model's token of every place is drawn with that place's own noise, whatever was
  drafted. A draft is kept if it is that token. So answers are plain decoding's, token for token.
* rejection: a draft is kept with probability min(1, p/q), of the model's probability p and the
  draft's q; behind the first that is not, the token is drawn from what p has more than q. This
  keeps more drafts. Answers differ from plain decoding's, though not their distribution. It needs
  the draft's probabilities of the whole vocabulary, and no draft may decide how many are verified.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v4jax.engine import choice
from v4jax.engine.choice import Draws
from v4jax.infer import sampling as sampling_lib
from v4jax.infer.sampling import Sampling

COUPLED, REJECTION = "coupled", "rejection"
RULES = (COUPLED, REJECTION)
_DRAFT, _ACCEPT, _INSTEAD = range(3)  # what a new token's key is folded with, under rejection


class Proposal(NamedTuple):
    """Drafts of a round.

    Attributes:
      token: [S,P]. confidence: float32 [S,P], whose sigmoid estimates that a draft is accepted if
        those before it are; None of a draft that does not say.
      probability: float32 [S,P,V], of what each was really drawn from; None under the coupled rule.
    """

    token: Any
    confidence: Any = None
    probability: Any = None

    def first(self, count: int) -> "Proposal":
        """The first drafts, without confidences."""
        chances = None if self.probability is None else self.probability[:, :count]
        return Proposal(self.token[:, :count], None, chances)


def draft(logits_SV, draws: Draws, place: int, rule: str):
    """A draft of each slot [S], and the probabilities [S,V] that it was drawn with, or None.

    Under the coupled rule it is drawn with the noise that the model will draw with: at a
    temperature above 0 two draws agree far more often so.
    """
    if rule == COUPLED:
        return choice.draw(logits_SV[:, None], draws, place)[:, 0], None
    keys_S = _keys(draws, place, 1, _DRAFT)[:, 0]
    token_S = sampling_lib.sample(logits_SV, keys_S, draws.sampling)
    return token_S, probabilities(logits_SV, draws.sampling)


def coupled(drafts_SP, token_SP, limit_S):
    """How many drafts are what the model chose at the place before each, from the first on."""
    return _kept(drafts_SP == token_SP[:, :-1], limit_S)


def rejection(logits_SPV, proposal: Proposal, limit_S, draws: Draws):
    """The tokens [S,P] of a round's places, and how many drafts of each slot are kept [S].

    A token behind the first draft that is not kept means nothing.

    Args:
      logits_SPV: the model's, at one place more than there are drafts, minus infinity where a token
        may not come.
      limit_S: how many drafts are verified. It may depend on anything but these drafts, and on
        them only behind one that the model cannot choose: that one is rejected for certain.
    """
    drafts_SD, q_SDV = proposal.token, proposal.probability
    slots, places, vocab = logits_SPV.shape
    sampling = jax.tree.map(lambda x: jnp.repeat(x, places), draws.sampling)
    p_SPV = probabilities(logits_SPV.reshape(-1, vocab), sampling).reshape(logits_SPV.shape)
    p_SDV = p_SPV[:, :-1]
    uniform_SD = _each(jax.random.uniform, _keys(draws, 0, places - 1, _ACCEPT))
    kept_S = _kept(uniform_SD < chance(p_SDV, q_SDV, drafts_SD), limit_S)
    # The place behind the last verified draft has no draft to be held against.
    verified_SD1 = jnp.arange(places - 1, dtype=jnp.int32)[None, :, None] < limit_S[:, None, None]
    instead_SDV = jnp.where(verified_SD1, residual(p_SDV, q_SDV), p_SDV)
    from_SPV = jnp.concatenate([instead_SDV, p_SPV[:, -1:]], axis=1)
    keys_SP = _keys(draws, 0, places, _INSTEAD)
    other_SP = _each(jax.random.categorical, keys_SP, jnp.log(from_SPV)).astype(jnp.int32)
    place_SD = jnp.arange(places - 1, dtype=jnp.int32)[None]
    token_SD = jnp.where(place_SD < kept_S[:, None], drafts_SD, other_SP[:, :-1])
    return jnp.concatenate([token_SD, other_SP[:, -1:]], axis=1), kept_S


def probabilities(logits_XV, sampling: Sampling):
    """Of each token to be drawn, filters and temperature included; 1 of the best one if greedy.

    Args:
      sampling: arrays [X].
    """
    best_X1 = jnp.argmax(logits_XV, axis=-1)[:, None]
    tokens_1V = jnp.arange(logits_XV.shape[1], dtype=best_X1.dtype)[None]
    greedy_XV = (tokens_1V == best_X1).astype(logits_XV.dtype)
    drawn_XV = jax.nn.softmax(sampling_lib.filtered(logits_XV, sampling))
    return jnp.where(jnp.asarray(sampling.temperature)[:, None] > 0, drawn_XV, greedy_XV)


def chance(p_SPV, q_SPV, drafts_SP):
    """The probability that each draft is kept if those before it are, min(1, p/q)."""
    p_SP, q_SP = (
        jnp.take_along_axis(x, drafts_SP[..., None], axis=2)[..., 0] for x in (p_SPV, q_SPV)
    )
    return jnp.minimum(1, p_SP / jnp.where(q_SP > 0, q_SP, 1))


def residual(p_SPV, q_SPV):
    """The probabilities of the token in place of a draft that is not kept."""
    more_SPV = jnp.maximum(p_SPV - q_SPV, 0)
    mass_SP1 = jnp.sum(more_SPV, axis=-1, keepdims=True)
    # No mass is left where rounding made two equal distributions of different ones.
    return jnp.where(mass_SP1 > 0, more_SPV / jnp.where(mass_SP1 > 0, mass_SP1, 1), p_SPV)


def _kept(right_SD, limit_S):
    """The number of drafts before the first that is not right, at most the limit."""
    place_SD = jnp.arange(right_SD.shape[1], dtype=jnp.int32)[None]
    right_SD &= place_SD < limit_S[:, None]
    return jnp.cumprod(right_SD.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)


def _keys(draws, first, places, use):
    keys_SP = choice.keys(draws, first, places)
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, use)))(keys_SP)


def _each(function, *arrays_SP):
    return jax.vmap(jax.vmap(function))(*arrays_SP)
