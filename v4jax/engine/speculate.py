"""Rounds: a draft proposes tokens, one call of the model verifies them (inference.md, section 3).

Without a draft a round is the same with no tokens proposed. `acceptance` has the rules by which
drafts are kept. By default every place is drawn as plain decoding draws it, with the key of its own
new token, and a draft is kept where it is that very token: a draft then changes how fast an answer
comes, and nothing of the answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from v4jax.engine import acceptance
from v4jax.engine.acceptance import COUPLED, Proposal
from v4jax.engine.choice import Choice, Draws, choose, chosen, finite, only_allowed
from v4jax.infer.placement import replicated
from v4jax.model import draft as draft_lib
from v4jax.model.cache import Cache


class Lane(NamedTuple):
    """The state of all slots.

    Attributes:
      cache: of all of them. anchor_S: the token that each is to read next.
      draft: what the draft remembers, and proposal: what it expects behind each anchor; None
        without a draft.
    """

    cache: Cache
    anchor_S: Any
    draft: Any = None
    proposal: Proposal | None = None


def propose(model, variables, lane: Lane, draws: Draws, width: int, rule: str) -> Proposal:
    """What a draft expects behind each anchor, `width` tokens; rule: of `acceptance.RULES`."""
    chances = []

    def pick(place, logits_SV):
        token_S, chance_SV = acceptance.draft(logits_SV, draws, place, rule)
        chances.append(chance_SV)
        return token_S

    drafts_SP, confidence_SP = draft_lib.propose(
        model, variables, lane.draft, lane.anchor_S, width, pick
    )
    chance_SPV = None if rule == COUPLED else jnp.stack(chances, axis=1)
    return replicated(model, Proposal(drafts_SP, confidence_SP, chance_SPV))


def verify(
    model,
    variables,
    lane: Lane,
    proposal: Proposal,
    limit_S,
    draws: Draws,
    kind: str | None,
    scored: bool,
    width: int,
    drafted: int,
    rule: str,
) -> tuple[Choice, Lane]:
    """One call of the model on each anchor and its drafts; the answer's next tokens.

    The next round's drafts are made here too: a program of their own costs a small model as much
    again to call as to run.

    Args:
      proposal: drafts, perhaps none; with probabilities they are held to the rejection rule.
      limit_S: how many of them each row may accept, below the width.
      kind: of the draft, None without one.
      scored: with log-probabilities. width: tokens of the call, the anchor and as many drafts.
      drafted, rule: of the next round's drafts, see `propose`.
    """
    proposal = proposal.first(width - 1)
    draws = draws._replace(allowed_SPW=draws.allowed_SPW[:, :width])
    active_S = draws.active.astype(jnp.int32)
    tokens_ST = jnp.concatenate([lane.anchor_S[:, None], proposal.token], axis=1)
    out = model.apply(
        variables,
        tokens_ST,
        cache=lane.cache,
        lengths=active_S * (limit_S + 1),
        logits="all",
        aux=() if kind is None else draft_lib.aux(kind),
    )
    logits_SPV = replicated(model, out.logits)
    choice, accepted_S = _choose(logits_SPV, proposal, limit_S, draws, scored)
    choice = choice._replace(count=active_S * (accepted_S + 1))
    # A slot whose logits are not finite ends: what it reads until then does not matter.
    newest_S = jnp.take_along_axis(choice.token, accepted_S[:, None], axis=1)[:, 0]
    anchor_S = jnp.where(draws.active, jnp.maximum(newest_S, 0), lane.anchor_S)
    cache, state = out.cache, lane.draft
    if width > 1:
        cache = cache.rollback(active_S * (limit_S - accepted_S))
    if kind is not None:
        behind_ST = jnp.maximum(choice.token, 0)
        taps = draft_lib.taps(out, kind)
        state = draft_lib.commit(model, variables, state, taps, behind_ST, choice.count)
        state = replicated(model, state)
    lane = Lane(cache, replicated(model, anchor_S), state)
    if kind is not None:
        ahead = draws._replace(step=draws.step + choice.count)
        lane = lane._replace(proposal=propose(model, variables, lane, ahead, drafted, rule))
    return replicated(model, choice), lane


def _choose(logits_SPV, proposal, limit_S, draws, scored):
    """The choice of every place, and how many drafts of each slot are accepted."""
    if proposal.probability is None:
        choice = choose(logits_SPV, draws, scored)
        return choice, acceptance.coupled(proposal.token, choice.token, limit_S)
    allowed_SPV = only_allowed(logits_SPV, draws.allowed_SPW)
    token_SP, accepted_S = acceptance.rejection(allowed_SPV, proposal, limit_S, draws)
    choice = chosen(logits_SPV, token_SP, draws, scored)
    # A place without finite logits is the last: its draft would be kept by nothing.
    finite_SP = finite(logits_SPV).astype(jnp.int32)
    sound_S = jnp.cumprod(finite_SP[:, :-1], axis=1).sum(axis=1, dtype=jnp.int32)
    return choice, jnp.minimum(accepted_S, sound_S)


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
