"""The engine's compiled programs: read a chunk of one prompt, take a slot, decode all slots.

Their shapes are few and known before the first request, so that none is compiled while requests
run: `warm_up` compiles all of them.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.engine import slots as slots_lib
from v4jax.engine import speculate
from v4jax.engine.choice import Choice, choose, logprobs, no_draws
from v4jax.engine.speculate import Lane
from v4jax.infer.compiled import CompiledPrograms, OnCompile
from v4jax.infer.executables import Executables, Program
from v4jax.infer.placement import Placement, replicated
from v4jax.model import draft as draft_lib
from v4jax.model import sharded
from v4jax.model.mtp_draft import MTPState

SMALLEST_WIDTH = 16
_SCORED_AT_ONCE = 128  # tokens whose logits stand in memory together


def widths(chunk: int) -> tuple[int, ...]:
    """The widths in which the last tokens of a prompt are read: powers of two, and the chunk."""
    powers = [1 << k for k in range(SMALLEST_WIDTH.bit_length() - 1, chunk.bit_length())]
    return (*(width for width in powers if width < chunk), chunk)


class Row(NamedTuple):
    """The state of a prompt that is being read: a cache of one row, and the draft's or None."""

    cache: Any
    draft: Any = None


class Programs:
    """The programs of one lane: a cache of `slots` rows of `max_length` tokens.

    Attributes:
      widths: in which prompts are read. rounds: in which anchors and drafts are verified.

    Args:
      placement: the models that read prompts and that decode. variables: as both take them.
      chunk: tokens of a prompt that are read at once; exact: in no other width.
      kind, drafted: of the draft and how many tokens it proposes; None and 0 without one.
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
        pages: bool = False,
        executables: Executables | None = None,
        on_compile: OnCompile | None = None,
    ):
        self._placement, self._variables = placement, variables
        self._slots, self._vocab = slots, placement.decode.config.vocab_size
        self._chunk, self.widths = chunk, (chunk,) if exact else widths(chunk)
        self._drafted, self._kind, self._pages = drafted, kind, pages
        # Only DSpark says which of its drafts are worth verifying.
        several = kind == "dspark" and not exact
        self.rounds = speculate.verified_widths(drafted) if several else (drafted + 1,)
        self._programs = CompiledPrograms(executables, on_compile)
        self._functions = _functions(placement.decode, kind, drafted, self.rounds)
        self._fresh_row = jax.jit(
            lambda: Row(placement.prefill.init_cache(1, max_length, drafted), _state(1))
        )
        self._fresh_lane = jax.jit(
            lambda: Lane(
                placement.decode.init_cache(slots, max_length, drafted),
                jnp.zeros(slots, jnp.int32),
                _state(slots),
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

    def first(self, logits_1V, draws, scored: bool) -> Choice:
        """The choice of a prompt's first new token; draws of one slot and one place."""
        return self._programs.run(self._choosing(logits_1V, draws, scored))

    def put(self, lane: Lane, slot: int, row: Row, token_11) -> Lane:
        """The lane with the row in a slot, and the token [1,1] that it is to read next."""
        return self._programs.run(self._putting(lane, slot, row, token_11))

    def propose(self, lane: Lane, draws):
        """Drafts [S,P] and their confidences, which may be None."""
        return self._programs.run(self._proposing(lane, draws))

    def verify(self, lane: Lane, drafts_SP, limit_S, draws, scored: bool, width: int):
        """The round's choice, and the lane; see `speculate.verify`."""
        return self._programs.run(self._verifying(lane, drafts_SP, limit_S, draws, scored, width))

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
        page = jax.eval_shape(functools.partial(_read_page, model), row, 0, 0)
        return page, jax.eval_shape(functools.partial(_read_rest, model), row, 0)

    def no_drafts(self):
        """Proposals and limits of a round without a draft."""
        return np.zeros((self._slots, self._drafted), np.int32), np.zeros(self._slots, np.int32)

    def no_draws(self):
        """Draws of all slots and all places of a round."""
        return no_draws(self._slots, self._vocab, 1 + self._drafted)

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
        drafts_SP, limit_S = self.no_drafts()
        drafts_SP = self._placement.replicate(jnp.asarray(drafts_SP))
        for width in self.widths:
            yield self._reading(*_padded((), width), row)
        padded, length = _padded((), self._chunk)
        yield self._scoring(padded, length, padded, row)
        for scored in (False, True):
            yield self._choosing(logits_1V, no_draws(1, self._vocab), scored)
            for width in self.rounds:
                yield self._verifying(lane, drafts_SP, limit_S, self.no_draws(), scored, width)
        yield self._putting(lane, 0, row, token_11)
        if self._drafted:
            yield self._proposing(lane, self.no_draws())
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

    def _choosing(self, logits_1V, draws, scored):
        name = "first token" + (", scored" if scored else "")
        return self._of_lane(name, "first", (logits_1V, draws), _like(scored), scored)

    def _putting(self, lane, slot, row, token_11):
        arguments = (self._variables, lane, np.int32(slot), row, token_11)
        return self._of_lane("a row into a slot", "put", arguments, lane)

    def _proposing(self, lane, draws):
        name = f"draft of {self._drafted} tokens of {self._slots} slots"
        like = (0, 0 if self._kind == "dspark" else None)
        return self._of_lane(name, "propose", (self._variables, lane, draws), like)

    def _verifying(self, lane, drafts_SP, limit_S, draws, scored, width):
        name = f"round of {self._slots} slots and {width - 1} of {self._drafted} drafts"
        name += ", scored" if scored else ""
        arguments = (self._variables, lane, drafts_SP, limit_S, draws)
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


# The same for engines of one model, which then share what is compiled.
@functools.lru_cache(maxsize=16)
def _functions(decoder, kind, drafted, rounds):
    """The jitted functions by name and whether log-probabilities are wanted."""

    def of(function, donated, **fixed):
        bound = functools.partial(function, **fixed)
        return jax.jit(bound, static_argnames="model", donate_argnames=donated)

    drafting = {"decoder": decoder, "kind": kind}
    functions = {
        ("read", False): of(_read, "row", **drafting),
        ("read_scored", False): of(_read_scored, "row", **drafting),
        ("put", False): of(_put, "lane"),
        ("propose", False): of(speculate.propose, (), width=drafted),
        ("read_page", False): of(_read_page, ()),
        ("write_page", False): of(_write_page, "row"),
        ("read_rest", False): of(_read_rest, ()),
        ("write_rest", False): of(_write_rest, "row"),
    }
    for scored in (False, True):
        functions["first", scored] = of(_first, (), scored=scored)
        for width in rounds:
            fixed = {"kind": kind, "scored": scored, "width": width}
            functions[f"verify {width}", scored] = of(speculate.verify, "lane", **fixed)
    return functions


def _read(model, variables, row: Row, tokens_1T, lengths_1, *, decoder, kind):
    aux = () if kind is None else draft_lib.aux(kind)
    out = model.apply(
        variables, tokens_1T, cache=row.cache, lengths=lengths_1, logits="last", aux=aux
    )
    row = _after(row, out, variables, tokens_1T, lengths_1, decoder, kind)
    return replicated(model, out.logits[:, 0]), row


def _after(row, out, variables, tokens_1T, lengths_1, decoder, kind):
    """The row after a chunk."""
    if kind is None:
        return row._replace(cache=out.cache)
    taps = replicated(decoder, draft_lib.taps(out, kind))
    state = draft_lib.seed(decoder, variables, row.draft, taps, tokens_1T, lengths_1)
    return Row(out.cache, jax.tree.map(functools.partial(replicated, decoder), state))


def _read_scored(model, variables, row: Row, tokens_1T, lengths_1, following_1T, *, decoder, kind):
    """A chunk with the log-probability of each next token, a block of tokens after the other."""
    aux = () if kind is None else draft_lib.aux(kind)
    out = model.apply(
        variables, tokens_1T, cache=row.cache, lengths=lengths_1, logits="normed", aux=aux
    )
    row = _after(row, out, variables, tokens_1T, lengths_1, decoder, kind)
    normed_TD, following_T = replicated(model, out.normed[0]), following_1T[0]
    head_VD = variables["params"]["head"]["weight"].astype(jnp.float32)

    def logits(normed_XD):
        return jnp.einsum("xd,vd->xv", normed_XD.astype(jnp.float32), head_VD)

    size = min(_SCORED_AT_ONCE, len(following_T))
    blocks = (normed_TD.reshape(-1, size, normed_TD.shape[1]), following_T.reshape(-1, size))
    scores = jax.lax.map(lambda block: logprobs(logits(block[0]), block[1]), blocks)
    scores = tuple(replicated(model, x.reshape(-1, *x.shape[2:])) for x in scores)
    last_1D = jax.lax.dynamic_slice_in_dim(normed_TD, lengths_1[0] - 1, 1)
    return replicated(model, logits(last_1D)), row, scores


def _first(model, logits_1V, draws, scored):
    choice = choose(logits_1V[:, None], draws, scored)
    return jax.tree.map(functools.partial(replicated, model), choice)


def _put(model, variables, lane: Lane, slot, row: Row, token_11):
    """The row in its slot; its draft is told of the first new token."""
    token_1 = jnp.maximum(token_11[:, 0], 0)
    cache, state = slots_lib.put(lane.cache, slot, row.cache), lane.draft
    if state is not None:
        began = draft_lib.begin(model, variables, row.draft, token_1, jnp.ones(1, bool))
        state = slots_lib.put_row(state, slot, began)
        state = jax.tree.map(functools.partial(replicated, model), state)
    if model.sharding.mesh is not None:
        places = sharded.cache_shardings(model.sharding, cache)
        cache = jax.lax.with_sharding_constraint(cache, places)
    return Lane(cache, replicated(model, slots_lib.put_row(lane.anchor_S, slot, token_1)), state)


def _read_page(model, state: Row | Lane, slot, number):
    page = slots_lib.read_page(model.config, model.min_repeats, state.cache, slot, number)
    return jax.tree.map(functools.partial(replicated, model), page)


def _write_page(model, row: Row, number, page):
    cache = slots_lib.write_page(model.config, model.min_repeats, row.cache, number, page)
    return row._replace(cache=cache)


def _read_rest(model, state: Row | Lane, slot):
    draft = {
        name: jax.lax.dynamic_slice_in_dim(getattr(state.draft, name), slot, 1, 0)
        for name in _kept(state.draft)
    }
    if isinstance(state, Lane) and isinstance(state.draft, MTPState):
        # A slot has the row of its last position, which reading would make with the next token;
        # the streams that it is made of are gone, and the block's own stand in for them.
        draft["window"] = jnp.roll(draft["window"], 1, axis=1)
    cache = slots_lib.read_rest(model.config, model.min_repeats, state.cache, slot)
    rest = {"cache": cache, "draft": draft}
    return jax.tree.map(functools.partial(replicated, model), rest)


def _write_rest(model, row: Row, rest, length):
    cache = slots_lib.write_rest(model.config, model.min_repeats, row.cache, rest["cache"], length)
    state = row.draft
    if state is not None:
        lengths = jnp.full_like(state.lengths, length)
        state = state.replace(**rest["draft"], lengths=lengths)
    return Row(cache, state)


def _kept(state):
    """Names of a draft's arrays that a prefix keeps: its logits are made anew."""
    names = [] if state is None else [field.name for field in dataclasses.fields(state)]
    return [name for name in names if name not in ("lengths", "logits")]
