"""The engine's compiled programs: read a chunk of one prompt, take a slot, decode all slots.

Their shapes are few and known before the first request, so that none is compiled while requests
run: `warm_up` compiles all of them.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.engine import speculate
from v4jax.engine.acceptance import COUPLED, REJECTION, Proposal
from v4jax.engine.adjust import Adjust, neutral
from v4jax.engine.choice import Choice, no_draws
from v4jax.engine.functions import Row, jitted, read_page, read_rest
from v4jax.engine.speculate import Lane
from v4jax.infer.compiled import CompiledPrograms, OnCompile, Progress
from v4jax.infer.executables import Executables, Program
from v4jax.infer.placement import Placement
from v4jax.model import draft as draft_lib

SMALLEST_WIDTH = 16


def widths(chunk: int) -> tuple[int, ...]:
    """The widths in which the last tokens of a prompt are read: powers of two, and the chunk."""
    powers = [1 << k for k in range(SMALLEST_WIDTH.bit_length() - 1, chunk.bit_length())]
    return (*(width for width in powers if width < chunk), chunk)


class Programs:
    """The programs of one lane: a cache of `slots` rows of `max_length` tokens.

    Attributes:
      widths: in which prompts are read. rounds: in which anchors and drafts are verified.

    Args:
      placement: the models that read prompts and that decode. variables: as both take them.
      chunk: tokens of a prompt that are read at once; exact: in no other width.
      kind, drafted: of the draft and how many tokens it proposes; None and 0 without one. rule: by
        which they are accepted.
      pages: whether rows are stored and restored.
      executables, on_compile: see `CompiledPrograms`.
    """

    def __init__(
        self,
        placement: Placement,
        variables: Any,
        *,
        slots: int,
        max_length: int,
        chunk: int,
        exact: bool,
        kind: str | None = None,
        drafted: int = 0,
        rule: str = COUPLED,
        pages: bool = False,
        executables: Executables | None = None,
        on_compile: OnCompile | None = None,
    ):
        self._placement, self._variables = placement, variables
        self._slots, self._vocab = slots, placement.decode.config.vocab_size
        self._chunk, self.widths = chunk, (chunk,) if exact else widths(chunk)
        self._drafted, self._kind, self._pages = drafted, kind, pages
        self._rule = rule if drafted else COUPLED
        # Only DSpark says which of its drafts are worth verifying, by what it drafted: rejection
        # would favour some tokens then.
        several = kind == "dspark" and not exact and rule == COUPLED
        self.rounds = speculate.verified_widths(drafted) if several else (drafted + 1,)
        self._programs = CompiledPrograms(executables, on_compile)
        self._functions = jitted(placement.one_row, kind, drafted, self.rounds, self._rule)
        self._fresh_row = jax.jit(
            lambda: Row(placement.prefill.init_cache(1, max_length, drafted), _state(1))
        )
        self._fresh_lane = jax.jit(
            lambda: Lane(
                placement.decode.init_cache(slots, max_length, drafted),
                jnp.zeros(slots, jnp.int32),
                _state(slots),
                None if kind is None else jax.tree.map(jnp.asarray, self.no_drafts()[0]),
            )
        )

        def _state(rows):
            return None if kind is None else draft_lib.init_state(placement.decode, rows, kind)

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._vocab

    @property
    def compiled(self) -> int:
        """Programs that were compiled, not read from disk."""
        return self._programs.compiled

    @property
    def compile_seconds(self) -> float:
        """How long making programs ready has taken."""
        return self._programs.seconds

    @property
    def progress(self) -> Progress | None:
        """Of programs that are being compiled now."""
        return self._programs.progress

    def warm_up(self) -> float:
        """Compiles everything; the seconds that it took."""
        return self._programs.prepare(list(self._all()))

    def fresh_row(self) -> Row:
        """An empty row, to read a prompt into."""
        return self._everywhere(self._fresh_row())

    def fresh_lane(self) -> Lane:
        """The empty state of all slots."""
        return self._everywhere(self._fresh_lane())

    def read(self, tokens, row: Row):
        """Reads tokens (at most the chunk) behind those of the row: logits [1,V], the row."""
        return self._programs.run(self._reading(*_padded(tokens, self._width(len(tokens))), row))

    def read_scored(self, tokens, following, row: Row):
        """The same, and of each token's follower own, top, top log-probabilities; see `Choice`.

        following: the token behind each; the last one's may be anything.
        """
        padded, length = _padded(tokens, self._chunk)
        behind, _ = _padded(following, self._chunk)
        logits_1V, row, scores = self._programs.run(self._scoring(padded, length, behind, row))
        return logits_1V, row, tuple(np.asarray(x)[: len(tokens)] for x in scores)

    def first(self, logits_1V, draws, scored: bool, adjust: Adjust | None = None) -> Choice:
        """The choice of a prompt's first new token; draws of one slot and one place."""
        return self._programs.run(self._choosing(logits_1V, draws, scored, adjust))

    def put(self, lane: Lane, slot: int, row: Row, token_11, draws) -> Lane:
        """The lane with the row in a slot, and the token [1,1] that it is to read next.

        draws: of that slot alone, from the token behind it on.
        """
        return self._programs.run(self._putting(lane, slot, row, token_11, draws))

    def proposed(self, lane: Lane) -> Proposal:
        """The next round's drafts of all slots."""
        return self.no_drafts()[0] if lane.proposal is None else lane.proposal

    def verify(self, lane: Lane, proposal: Proposal, limit_S, draws, scored, width, adjust=None):
        """The round's choice, and the lane; see `speculate.verify`. adjust: an `Adjust` or None."""
        run = self._verifying(lane, proposal, limit_S, draws, scored, width, adjust)
        return self._programs.run(run)

    def read_page(self, state: Row | Lane, slot: int, number: int):
        """The entries of a page of a slot, or of a row (slot 0); see `slots`."""
        return self._programs.run(self._paging(state, slot, number))

    def write_page(self, row: Row, number: int, page) -> Row:
        """The row with a page in its place."""
        return self._programs.run(self._page_into(row, number, page))

    def read_rest(self, state: Row | Lane, slot: int):
        """What a slot at the end of a page keeps beside its pages; see `slots`."""
        return self._programs.run(self._resting(state, slot))

    def write_rest(self, row: Row, rest, length: int) -> Row:
        """A fresh row that goes on behind `length` tokens, whose pages it has."""
        return self._programs.run(self._rest_into(row, rest, length))

    @functools.cached_property
    def described(self):
        """Shapes of a page and of a rest."""
        row = jax.eval_shape(self._fresh_row)
        model = self._placement.decode
        page = jax.eval_shape(functools.partial(read_page, model), row, 0, 0)
        return page, jax.eval_shape(functools.partial(read_rest, model), row, 0)

    def no_drafts(self):
        """Proposals and limits of a round in which nothing is proposed."""
        shape, sure, chances = (self._slots, self._drafted), None, None
        if self._kind == "dspark":
            sure = np.zeros(shape, np.float32)
        if self._rule == REJECTION:
            chances = np.zeros((*shape, self._vocab), np.float32)
        return Proposal(np.zeros(shape, np.int32), sure, chances), np.zeros(self._slots, np.int32)

    def no_draws(self):
        """Draws of all slots and all places of a round."""
        return no_draws(self._slots, self._vocab, 1 + self._drafted)

    @functools.cached_property
    def _neutral(self):
        """No adjustments, on the device: of one slot and of all; they cost a round no copy."""

        def made(slots):
            plain = neutral(slots, self._vocab)
            large = (self._placement.replicate(jnp.asarray(x)) for x in (plain.seen, plain.bias))
            return plain._replace(**dict(zip(("seen", "bias"), large, strict=True)))

        return {slots: made(slots) for slots in (1, self._slots)}

    def _everywhere(self, state):
        """On a mesh all but the cache, which has places of its own, is on every device."""
        if self._placement.decode.sharding.mesh is None:
            return state
        return state._replace(
            **{
                name: jax.tree.map(self._placement.replicate, value)
                for name, value in state._asdict().items()
                if name != "cache"
            }
        )

    def _width(self, length):
        return next(width for width in self.widths if width >= length)

    def _all(self) -> Iterator[Program]:
        row, lane = self.fresh_row(), self.fresh_lane()
        logits_1V = self._placement.replicate(jnp.zeros((1, self._vocab), jnp.float32))
        token_11 = self._placement.replicate(jnp.zeros((1, 1), jnp.int32))
        proposal, limit_S = self.proposed(lane), self.no_drafts()[1]
        for width in self.widths:
            yield self._reading(*_padded((), width), row)
        padded, length = _padded((), self._chunk)
        yield self._scoring(padded, length, padded, row)
        for scored in (False, True):
            yield self._choosing(logits_1V, no_draws(1, self._vocab), scored)
            for width in self.rounds:
                yield self._verifying(lane, proposal, limit_S, self.no_draws(), scored, width)
        yield self._putting(lane, 0, row, token_11, no_draws(1, self._vocab))
        if self._pages:
            page, rest = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.described)
            for state in (row, lane):
                yield self._paging(state, 0, 0)
                yield self._resting(state, 0)
            yield self._page_into(row, 0, page)
            yield self._rest_into(row, rest, 0)

    def _reading(self, tokens_1T, lengths_1, row):
        name = f"prefill of {tokens_1T.shape[1]} tokens of a request"
        arguments = (self._variables, row, tokens_1T, lengths_1)
        return self._of_prompt(name, "read", arguments, (0, row))

    def _scoring(self, tokens_1T, lengths_1, following_1T, row):
        arguments = (self._variables, row, tokens_1T, lengths_1, following_1T)
        return self._of_prompt("scores of a prompt", "read_scored", arguments, (0, row, (0,) * 3))

    def _choosing(self, logits_1V, draws, scored, adjust=None):
        draws = draws._replace(adjust=adjust or self._neutral[1])
        name = "first token" + (", scored" if scored else "")
        return self._of_lane(name, "first", (logits_1V, draws), _like(scored), scored)

    def _putting(self, lane, slot, row, token_11, draws):
        arguments = (self._variables, lane, np.int32(slot), row, token_11, draws)
        return self._of_lane("a row into a slot", "put", arguments, lane)

    def _verifying(self, lane, proposal, limit_S, draws, scored, width, adjust=None):
        draws = draws._replace(adjust=adjust or self._neutral[self._slots])
        name = f"round of {self._slots} slots and {width - 1} of {self._drafted} drafts"
        name += ", scored" if scored else ""
        # What the lane holds is given away: drafts stand beside it.
        alone, proposal = lane._replace(proposal=None), proposal._replace(confidence=None)
        arguments = (self._variables, alone, proposal, limit_S, draws)
        like = (_like(scored), lane)
        return self._of_lane(name, f"verify {width}", arguments, like, scored)

    def _paging(self, state, slot, number):
        name = f"page of a {type(state).__name__.lower()}"
        arguments = (state, np.int32(slot), np.int32(number))
        return self._of_lane(name, "read_page", arguments, self.described[0])

    def _page_into(self, row, number, page):
        return self._of_lane("page into a row", "write_page", (row, np.int32(number), page), row)

    def _resting(self, state, slot):
        name = f"rest of a {type(state).__name__.lower()}"
        return self._of_lane(name, "read_rest", (state, np.int32(slot)), self.described[1])

    def _rest_into(self, row, rest, length):
        return self._of_lane("rest into a row", "write_rest", (row, rest, np.int32(length)), row)

    def _of_prompt(self, name, function, arguments, like):
        model = self._placement.prefill
        return Program(name, self._functions[function, False], model, arguments, like)

    def _of_lane(self, name, function, arguments, like, scored=False):
        model = self._placement.decode
        return Program(name, self._functions[function, scored], model, arguments, like)


def _padded(tokens, width):
    """Tokens [1,T] and how many of them are real, [1]."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)


def _like(scored):
    """A value with the structure of a choice."""
    return Choice(0, 0, 0, 0, 0) if scored else Choice(0, 0)
