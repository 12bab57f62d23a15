"""Rounds: a draft proposes tokens, one call of the model verifies them (inference.md, section 3).

Without a draft a round is the same with no tokens proposed. Every place is drawn as plain decoding
draws it, with the key of its own new token; a draft is accepted where it is that very token. So a
draft changes how fast an answer comes, and nothing of the answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from v4jax.engine.choice import Choice, Draws, choose, draw
from v4jax.infer.placement import replicated
from v4jax.model import draft as draft_lib
from v4jax.model.cache import Cache


class Lane(NamedTuple):
    """The state of all slots: their cache, the token that each is to read next [S], the draft's.

    The last is None without a draft.
    """

    cache: Cache
    anchor_S: Any
    draft: Any = None


def propose(model, variables, lane: Lane, draws: Draws, width: int):
    """Tokens that a draft expects behind each anchor [S,width], and its confidences or None.

    It draws with the noise that the model will draw with: at a temperature above 0 two draws agree
    far more often so.
    """

    def pick(place, logits_SV):
        return draw(logits_SV[:, None], draws, place)[:, 0]

    drafts_SP, confidence_SP = draft_lib.propose(
        model, variables, lane.draft, lane.anchor_S, width, pick
    )
    return replicated(model, (drafts_SP, confidence_SP))


def verify(
    model,
    variables,
    lane: Lane,
    drafts_SP,
    limit_S,
    draws: Draws,
    kind: str | None,
    scored: bool,
    width: int,
) -> tuple[Choice, Lane]:
    """One call of the model on each anchor and its drafts; the answer's next tokens.

    Args:
      drafts_SP: proposed tokens, perhaps none.
      limit_S: how many of them each row may accept, below the width.
      kind: of the draft, None without one.
      scored: with log-probabilities. width: tokens of the call, the anchor and as many drafts.
    """
    drafts_SP = drafts_SP[:, : width - 1]
    draws = draws._replace(allowed_SPW=draws.allowed_SPW[:, :width])
    active_S = draws.active.astype(jnp.int32)
    tokens_ST = jnp.concatenate([lane.anchor_S[:, None], drafts_SP], axis=1)
    out = model.apply(
        variables,
        tokens_ST,
        cache=lane.cache,
        lengths=active_S * (limit_S + 1),
        logits="all",
        aux=() if kind is None else draft_lib.aux(kind),
    )
    choice = choose(replicated(model, out.logits), draws, scored, drafts_SP)
    accepted_S = _accepted(drafts_SP, choice.token, limit_S)
    choice = choice._replace(count=active_S * (accepted_S + 1))
    # A slot whose logits are not finite ends: what it reads until then does not matter.
    newest_S = jnp.take_along_axis(choice.token, accepted_S[:, None], axis=1)[:, 0]
    anchor_S = jnp.where(draws.active, jnp.maximum(newest_S, 0), lane.anchor_S)
    cache, state = out.cache, lane.draft
    if drafts_SP.shape[1]:
        cache = cache.rollback(active_S * (limit_S - accepted_S))
    if kind is not None:
        behind_ST = jnp.maximum(choice.token, 0)
        taps = draft_lib.taps(out, kind)
        state = draft_lib.commit(model, variables, state, taps, behind_ST, choice.count)
        state = replicated(model, state)
    return replicated(model, choice), Lane(cache, replicated(model, anchor_S), state)


def _accepted(drafts_SP, token_SP, limit_S):
    """How many drafts are what the model chose at the place before each, from the first on."""
    place = jnp.arange(drafts_SP.shape[1], dtype=jnp.int32)[None]
    right_SP = (drafts_SP == token_SP[:, :-1]) & (place < limit_S[:, None])
    return jnp.cumprod(right_SP.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)


class Widths:
    """How many drafts of a round are worth verifying (inference.md, 4.7).

    Verifying more costs more. With the seconds that a round of each width takes, and the confidence
    in each draft, the width that brings most tokens a second is taken. No token depends on it.

    Args:
      widths: those that are compiled, the anchor counted.
    """

    def __init__(self, widths: Sequence[int]):
        self._widths = tuple(widths)
        self._seconds: dict[int, float] = {}

    def choose(self, confidence_SP: np.ndarray, active_S: np.ndarray) -> int:
        """The width of the next round.

        Args:
          confidence_SP: float32, whose sigmoid estimates that a draft is accepted if those before
            it are.
        """
        for width in self._widths:  # each has to be measured once
            if width not in self._seconds:
                return width
        survival_SP = np.cumprod(1 / (1 + np.exp(-confidence_SP[active_S].astype(np.float64))), 1)
        gain = {w: active_S.sum() + survival_SP[:, : w - 1].sum() for w in self._widths}
        return max(self._widths, key=lambda width: gain[width] / self._seconds[width])

    def took(self, width: int, seconds: float) -> None:
        """Tells how long a round took; the newest counts for a tenth."""
        before = self._seconds.get(width, seconds)
        self._seconds[width] = 0.9 * before + 0.1 * seconds


def verified_widths(drafted: int) -> tuple[int, ...]:
    """Widths to compile: none of the drafts, two of them, all; fewer where there are fewer."""
    return tuple(sorted({1, min(3, drafted + 1), drafted + 1}))
