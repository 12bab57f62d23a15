"""The compiled programs of generation: a chunk of prefill, the choice of a token, a decode step.

The model is a static argument of each, so that a second call with the same shapes compiles nothing.
With `Executables` another process compiles nothing either.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.infer import sampling as sampling_lib
from v4jax.infer.compiled import CompiledPrograms, OnCompile
from v4jax.infer.executables import Executables, Program
from v4jax.infer.placement import Placement, replicated


class Decoder:
    """The compiled programs with the arguments that stay the same.

    Args:
      placement: the models that read prompts and that decode.
      variables, setting, key: as the programs take them.
      executables: where compiled programs are kept for other processes, if anywhere.
      on_compile: see `generate`.
    """

    runs_ahead = True  # a step is under way before the tokens of the one before are read

    def __init__(
        self,
        placement: Placement,
        variables: dict[str, Any],
        setting: sampling_lib.Sampling,
        key: jax.Array,
        executables: Executables | None = None,
        on_compile: OnCompile | None = None,
    ):
        self._placement = placement
        self._variables = variables
        self._setting = setting
        self._key = key
        self._programs = CompiledPrograms(executables, on_compile)

    def empty_cache(self, rows: int, capacity: int):
        """A cache for so many rows of so many tokens."""
        return self._placement.prefill.init_cache(rows, capacity)

    def prefill(self, chunks, cache):
        """The first token of each row, [B], and the cache that holds the prompts."""
        logits_BV = self._no_logits(chunks)
        for tokens_BT, lengths_B in chunks:
            program = self._reading(tokens_BT, lengths_B, cache, logits_BV)
            logits_BV, cache = self._programs.run(program)
        return self._programs.run(self._choice(logits_BV)), self._placement.handed_over(cache)

    def decode(self, tokens_B, cache, step):
        """The token after `tokens_B` in each row, and the cache that holds `tokens_B` too."""
        return self._programs.run(self._step(tokens_B, cache, step))

    def compile(self, chunks, cache, decode) -> float:
        """Compiles what is needed, to keep it out of the other timings; the seconds it took."""
        return self._programs.prepare(list(self._needed(chunks, cache, decode)))

    def _needed(self, chunks, cache, decode) -> Iterator[Program]:
        logits_BV = self._no_logits(chunks)
        for tokens_BT, lengths_B in {chunk[0].shape: chunk for chunk in chunks}.values():
            yield self._reading(tokens_BT, lengths_B, cache, logits_BV)
        yield self._choice(logits_BV)
        if decode:
            tokens_B = self._placement.replicate(jnp.zeros(len(logits_BV), jnp.int32))
            yield self._step(tokens_B, self._placement.described(cache), 1)

    def _reading(self, tokens_BT, lengths_B, cache, logits_BV):
        name = f"prefill of {tokens_BT.shape[1]} tokens"
        arguments = (self._variables, cache, tokens_BT, lengths_B, logits_BV)
        return Program(name, _prefill, self._placement.prefill, arguments, (logits_BV, cache))

    def _choice(self, logits_BV):
        arguments = (logits_BV, self._setting, self._key, np.int32(0))
        return Program("choice of a token", _pick, self._placement.decode, arguments, logits_BV)

    def _step(self, tokens_B, cache, step):
        arguments = (self._variables, cache, tokens_B, self._setting, self._key, np.int32(step))
        return Program("decode step", _decode, self._placement.decode, arguments, (tokens_B, cache))

    def _no_logits(self, chunks):
        shape = (len(chunks[0][0]), self._placement.prefill.config.vocab_size)
        return self._placement.replicate(jnp.zeros(shape, jnp.float32))


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "logits_BV"))
def _prefill(model, variables, cache, tokens_BT, lengths_B, logits_BV):
    """One chunk; the logits of a row are those of the last chunk that holds some of it."""
    out = model.apply(variables, tokens_BT, cache=cache, lengths=lengths_B, logits="last")
    logits_BV = jnp.where(lengths_B[:, None] > 0, out.logits[:, 0], logits_BV)
    return replicated(model, logits_BV), out.cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _decode(model, variables, cache, tokens_B, setting, key, step):
    out = model.apply(variables, tokens_B[:, None], cache=cache, logits="last")
    return _pick(model, out.logits[:, 0], setting, key, step), out.cache


def choose(model, logits_BV, setting: sampling_lib.Sampling, key: jax.Array, step: int):
    """The next token of each row, [B]; -1 where the logits are not finite."""
    return _pick(model, logits_BV, setting, key, np.int32(step))


@functools.partial(jax.jit, static_argnames="model")
def _pick(model, logits_BV, setting, key, step):
    """The next token of each row, [B]; -1 where the logits are not finite."""
    logits_BV = replicated(model, logits_BV)
    keys_B = sampling_lib.row_keys(key, len(logits_BV), step)
    tokens_B = sampling_lib.sample(logits_BV, keys_B, setting)
    return jnp.where(jnp.isfinite(logits_BV).all(axis=-1), tokens_B, -1)
