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

from v4jax.engine import slots as slots_lib
from v4jax.engine.choice import Choice, choose, logprobs, no_draws
from v4jax.infer.compiled import CompiledPrograms, OnCompile
from v4jax.infer.executables import Executables, Program
from v4jax.infer.placement import Placement, replicated
from v4jax.model import sharded

SMALLEST_WIDTH = 16
_SCORED_AT_ONCE = 128  # tokens whose logits stand in memory together


def widths(chunk: int) -> tuple[int, ...]:
    """The widths in which the last tokens of a prompt are read: powers of two, and the chunk."""
    powers = [1 << k for k in range(SMALLEST_WIDTH.bit_length() - 1, chunk.bit_length())]
    return (*(width for width in powers if width < chunk), chunk)


class Programs:
    """The programs of one lane: a cache of `slots` rows of `max_length` tokens.

    Args:
      placement: the models that read prompts and that decode. variables: as both take them.
      chunk: tokens of a prompt that are read at once; exact: in no other width.
      executables: where compiled programs are kept for other processes, if anywhere.
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
        executables: Executables | None = None,
    ):
        self._placement, self._variables = placement, variables
        self._slots, self._vocab = slots, placement.decode.config.vocab_size
        self._chunk, self.widths = chunk, (chunk,) if exact else widths(chunk)
        self._programs = CompiledPrograms(executables)
        self._fresh_row = jax.jit(lambda: placement.prefill.init_cache(1, max_length))
        self._fresh_lane = jax.jit(lambda: placement.decode.init_cache(slots, max_length))

    @property
    def compiled(self) -> int:
        """Programs that were compiled, not read from disk."""
        return self._programs.compiled

    def warm_up(self, on_compile: OnCompile | None = None) -> float:
        """Compiles everything; the seconds that it took."""
        return self._programs.prepare(list(self._all()), on_compile)

    def fresh_row(self):
        """An empty cache of one row, to read a prompt into."""
        return self._fresh_row()

    def fresh_lane(self):
        """The empty cache of all slots, and the token that each is to read next, [S]."""
        return self._fresh_lane(), self._placement.replicate(jnp.zeros(self._slots, jnp.int32))

    def read(self, tokens, row):
        """Reads tokens (at most the chunk) behind those of the row: logits [1,V], the row."""
        return self._programs.run(self._reading(_padded(tokens, self._width(len(tokens))), row))

    def read_scored(self, tokens, following, row):
        """The same, and of each token's follower own, top, top log-probabilities; see `Choice`.

        following: the token behind each; the last one's may be anything.
        """
        padded, length = _padded(tokens, self._chunk)
        behind, _ = _padded(following, self._chunk)
        logits_1V, row, scores = self._programs.run(self._scoring(padded, behind, length, row))
        return logits_1V, row, tuple(np.asarray(x)[: len(tokens)] for x in scores)

    def first(self, logits_1V, draws, scored: bool) -> Choice:
        """The choice of a prompt's first new token; draws of one slot."""
        return self._programs.run(self._choosing(logits_1V, draws, scored))

    def put(self, cache, tokens_S, slot: int, row, token_1):
        """The lane with the row in a slot, and the tokens with the one that it is to read."""
        return self._programs.run(self._putting(cache, tokens_S, slot, row, token_1))

    def decode(self, cache, tokens_S, draws, scored: bool):
        """A round: the choice of each active slot, the lane, and the tokens to read next."""
        return self._programs.run(self._decoding(cache, tokens_S, draws, scored))

    def _width(self, length):
        return next(width for width in self.widths if width >= length)

    def _all(self) -> Iterator[Program]:
        row, (cache, tokens_S) = self.fresh_row(), self.fresh_lane()
        logits_1V = self._placement.replicate(jnp.zeros((1, self._vocab), jnp.float32))
        token_1 = self._placement.replicate(jnp.zeros(1, jnp.int32))
        none = np.zeros(0, np.int32)
        for width in self.widths:
            yield self._reading(_padded(none, width), row)
        padded, length = _padded(none, self._chunk)
        yield self._scoring(padded, padded, length, row)
        for scored in (False, True):
            yield self._choosing(logits_1V, no_draws(1, self._vocab), scored)
            yield self._decoding(cache, tokens_S, no_draws(self._slots, self._vocab), scored)
        yield self._putting(cache, tokens_S, 0, row, token_1)

    def _reading(self, padded, row):
        tokens_1T, lengths_1 = padded
        name = f"prefill of {tokens_1T.shape[1]} tokens of a request"
        arguments = (self._variables, row, tokens_1T, lengths_1)
        like = (lengths_1, row)
        return Program(name, _read, self._placement.prefill, arguments, like)

    def _scoring(self, tokens_1T, following_1T, lengths_1, row):
        arguments = (self._variables, row, tokens_1T, following_1T, lengths_1)
        like = (lengths_1, row, (lengths_1,) * 3)
        return Program("scores of a prompt", _read_scored, self._placement.prefill, arguments, like)

    def _choosing(self, logits_1V, draws, scored):
        name = "first token" + (", scored" if scored else "")
        function = _first_scored if scored else _first
        arguments = (logits_1V, draws)
        return Program(name, function, self._placement.decode, arguments, _like(scored))

    def _putting(self, cache, tokens_S, slot, row, token_1):
        arguments = (cache, tokens_S, np.int32(slot), row, token_1)
        like = (cache, tokens_S)
        return Program("a row into a slot", _put, self._placement.decode, arguments, like)

    def _decoding(self, cache, tokens_S, draws, scored):
        name = f"decode round of {self._slots} slots" + (", scored" if scored else "")
        function = _decode_scored if scored else _decode
        arguments = (self._variables, cache, tokens_S, draws)
        like = (_like(scored), cache, tokens_S)
        return Program(name, function, self._placement.decode, arguments, like)


def _padded(tokens, width):
    """Tokens [1,T] and how many of them are real, [1]."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded, np.array([len(tokens)], np.int32)


def _like(scored):
    """A value with the structure of a choice."""
    return Choice(0, 0, 0, 0) if scored else Choice(0)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="row")
def _read(model, variables, row, tokens_1T, lengths_1):
    out = model.apply(variables, tokens_1T, cache=row, lengths=lengths_1, logits="last")
    return replicated(model, out.logits[:, 0]), out.cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="row")
def _read_scored(model, variables, row, tokens_1T, following_1T, lengths_1):
    """A chunk with the log-probability of each next token, a block of tokens after the other."""
    out = model.apply(variables, tokens_1T, cache=row, lengths=lengths_1, logits="normed")
    normed_TD, following_T = replicated(model, out.normed[0]), following_1T[0]
    head_VD = variables["params"]["head"]["weight"].astype(jnp.float32)

    def logits(normed_XD):
        return jnp.einsum("xd,vd->xv", normed_XD.astype(jnp.float32), head_VD)

    size = min(_SCORED_AT_ONCE, len(following_T))
    blocks = (normed_TD.reshape(-1, size, normed_TD.shape[1]), following_T.reshape(-1, size))
    scores = jax.lax.map(lambda block: logprobs(logits(block[0]), block[1]), blocks)
    scores = tuple(replicated(model, x.reshape(-1, *x.shape[2:])) for x in scores)
    last_1D = jax.lax.dynamic_slice_in_dim(normed_TD, lengths_1[0] - 1, 1)
    return replicated(model, logits(last_1D)), out.cache, scores


def _choose(model, logits_1V, draws, scored):
    return jax.tree.map(functools.partial(replicated, model), choose(logits_1V, draws, scored))


def _step(model, variables, cache, tokens_S, draws, scored):
    """A token of each active slot; the others take part with none and keep all that they have."""
    lengths_S = draws.active.astype(jnp.int32)
    out = model.apply(variables, tokens_S[:, None], cache=cache, lengths=lengths_S, logits="last")
    choice = _choose(model, replicated(model, out.logits[:, 0]), draws, scored)
    # A slot whose logits are not finite ends: what it reads until then does not matter.
    tokens_S = jnp.where(draws.active, jnp.maximum(choice.token, 0), tokens_S)
    return choice, out.cache, tokens_S


_first = jax.jit(functools.partial(_choose, scored=False), static_argnames="model")
_first_scored = jax.jit(functools.partial(_choose, scored=True), static_argnames="model")
_donated = {"static_argnames": "model", "donate_argnames": ("cache", "tokens_S")}
_decode = jax.jit(functools.partial(_step, scored=False), **_donated)
_decode_scored = jax.jit(functools.partial(_step, scored=True), **_donated)


@functools.partial(jax.jit, **_donated)
def _put(model, cache, tokens_S, slot, row, token_1):
    tokens_S = slots_lib.put_number(tokens_S, slot, jnp.maximum(token_1, 0))
    cache = slots_lib.put(cache, slot, row)
    if model.sharding.mesh is not None:
        places = sharded.cache_shardings(model.sharding, cache)
        cache = jax.lax.with_sharding_constraint(cache, places)
    return cache, replicated(model, tokens_S)
