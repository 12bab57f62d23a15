"""The compiled programs of generation: a chunk of prefill, the choice of a token, a decode step.

The model is a static argument of each, so that a second call with the same shapes compiles nothing.
"""

import concurrent.futures
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.infer import sampling as sampling_lib
from v4jax.infer.placement import Placement, replicated
from v4jax.sharding import processes


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The compiled programs with the arguments that stay the same."""

    placement: Placement
    variables: dict
    setting: sampling_lib.Sampling
    key: jax.Array

    def prefill(self, chunks, cache):
        """The first token of each row, [B], and the cache that holds the prompts."""
        logits_BV = self._no_logits(chunks)
        for tokens_BT, lengths_B in chunks:
            logits_BV, cache = _prefill(
                self.placement.prefill, self.variables, cache, tokens_BT, lengths_B, logits_BV
            )
        tokens_B = _pick(self.placement.decode, logits_BV, self.setting, self.key, np.int32(0))
        return tokens_B, self.placement.handed_over(cache)

    def decode(self, tokens_B, cache, step):
        """The token after `tokens_B` in each row, and the cache that holds `tokens_B` too."""
        return _decode(
            self.placement.decode,
            self.variables,
            cache,
            tokens_B,
            self.setting,
            self.key,
            np.int32(step),
        )

    def compile(self, chunks, cache, decode):
        """Compiles what is needed, to keep it out of the other timings; the seconds it took."""
        started = time.perf_counter()
        logits_BV = self._no_logits(chunks)
        step, programs = np.int32(0), []
        for tokens_BT, lengths_B in {chunk[0].shape: chunk for chunk in chunks}.values():
            model = self.placement.prefill
            arguments = (model, self.variables, cache, tokens_BT, lengths_B, logits_BV)
            programs.append(_prefill.lower(*arguments))
        model = self.placement.decode
        programs.append(_pick.lower(model, logits_BV, self.setting, self.key, step))
        if decode:
            tokens_B = self.placement.replicate(jnp.zeros(len(logits_BV), jnp.int32))
            cache = self.placement.described(cache)
            arguments = (model, self.variables, cache, tokens_B, self.setting, self.key, step)
            programs.append(_decode.lower(*arguments))
        # An accelerator's compiler may time kernels on it, which wants no company.
        at_once = len(programs) if jax.default_backend() == "cpu" else 1
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda each: each.compile(), programs))
        processes.compiled()
        return time.perf_counter() - started

    def _no_logits(self, chunks):
        shape = (len(chunks[0][0]), self.placement.prefill.config.vocab_size)
        return self.placement.replicate(jnp.zeros(shape, jnp.float32))


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


@functools.partial(jax.jit, static_argnames="model")
def _pick(model, logits_BV, setting, key, step):
    """The next token of each row, [B]; -1 where the logits are not finite."""
    logits_BV = replicated(model, logits_BV)
    keys_B = sampling_lib.row_keys(key, len(logits_BV), step)
    tokens_B = sampling_lib.sample(logits_BV, keys_B, setting)
    return jnp.where(jnp.isfinite(logits_BV).all(axis=-1), tokens_B, -1)
