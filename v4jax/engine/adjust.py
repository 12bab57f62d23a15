"""Penalties and biases: what is added to a request's logits before its next token is chosen.

In this order: the bias of a token; a division by `repetition` of the logits above 0 of tokens that
prompt or answer have, a multiplication of those below; `frequency` times how often the answer has
the token, and `presence` if it has it, taken off. The counts are the host's: a round of a request
with penalties waits for the tokens before it, as one with a grammar does.
"""

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.errors import InputError
from v4jax.infer.arguments import whole_number

MOST = 100.0  # of a bias or a penalty either way


class Adjustment(NamedTuple):
    """What one request asks for; see the module. bias: by token id."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it depends on the tokens so far."""
        return self[:3] != NONE[:3]


NONE = Adjustment()


class Adjust(NamedTuple):
    """The adjustments of all slots, arrays that a compiled choice takes.

    Attributes:
      on [S]: whether a slot has one; the logits of the others keep their bits.
      repetition, presence, frequency [S].
      seen [S,V]: twice how often the answer has a token, and one more if the prompt has it.
      bias [S,V].
    """

    on: Any
    repetition: Any
    presence: Any
    frequency: Any
    seen: Any
    bias: Any


def check(repetition, presence, frequency, bias, vocab_size: int) -> Adjustment | None:
    """The values as plain ones; None where they change nothing.

    Raises:
      InputError: a value out of range.
    """
    found = Adjustment(
        _number("repetition", repetition, 0.01, MOST),
        _number("presence", presence, -MOST, MOST),
        _number("frequency", frequency, -MOST, MOST),
        _biases(bias, vocab_size),
    )
    return None if found == NONE else found


def _biases(bias, vocab_size):
    if bias is None:
        return ()
    if not isinstance(bias, Mapping):
        raise InputError(f"bias has type {type(bias).__name__}; expected numbers by token id")
    checked = (
        (whole_number("a token of bias", token, 0, vocab_size - 1), _number("bias", value))
        for token, value in bias.items()
    )
    return tuple(sorted((token, value) for token, value in checked if value))


def _number(name, value, low=-MOST, high=MOST):
    sound = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not sound or not low <= value <= high:  # NaN is not
        raise InputError(
            f"{name} is {str(value)[:100]}; expected a number from {low:g} to {high:g}"
        )
    return float(value)


def neutral(slots: int, vocab_size: int) -> Adjust:
    """No adjustment of any slot."""
    return Adjust(
        on=np.zeros(slots, bool),
        repetition=np.ones(slots, np.float32),
        presence=np.zeros(slots, np.float32),
        frequency=np.zeros(slots, np.float32),
        seen=np.zeros((slots, vocab_size), np.int32),
        bias=np.zeros((slots, vocab_size), np.float32),
    )


class Adjusting:
    """The adjustments of the slots, as their answers grow.

    Args:
      slots, vocab_size: of the engine.
    """

    def __init__(self, slots: int, vocab_size: int):
        self._slots, self._vocab = slots, vocab_size
        self._arrays: Adjust | None = None  # none before the first request that asks
        self._counted = [0] * slots

    def begin(self, slot: int, adjustment: Adjustment | None, prompt: np.ndarray) -> None:
        """A request has the slot."""
        if self._arrays is None:
            if adjustment is None:
                return
            self._arrays = neutral(self._slots, self._vocab)
        arrays = self._arrays
        arrays.on[slot] = adjustment is not None
        if adjustment is None:
            return
        arrays.repetition[slot], arrays.presence[slot] = adjustment.repetition, adjustment.presence
        arrays.frequency[slot] = adjustment.frequency
        arrays.seen[slot], arrays.bias[slot], self._counted[slot] = 0, 0, 0
        arrays.seen[slot, prompt] = 1
        for token, value in adjustment.bias:
            arrays.bias[slot, token] = value

    def end(self, slot: int) -> None:
        """The request that has the slot ends."""
        if self._arrays is not None:
            self._arrays.on[slot] = False

    def count(self, slot: int, made: list[int]) -> None:
        """The answer of a slot has so many tokens by now; those behind the last call are new."""
        if self._arrays is not None and self._arrays.on[slot]:
            new = np.array(made[self._counted[slot] :], np.int64)
            np.add.at(self._arrays.seen[slot], new, 2)
            self._counted[slot] = len(made)

    def of(self, slots) -> Adjust | None:
        """A copy for these slots, an index of arrays; None where none of them has any."""
        if self._arrays is None or not self._arrays.on[slots].any():
            return None
        return Adjust(*(np.array(x[slots]) for x in self._arrays))


def adjusted(logits_SPV, adjust: Adjust, drafts_SD):
    """The logits of each slot's places; a place counts the drafts before it."""

    def some(logits_SPV):
        changed_SPV = _changed(logits_SPV, adjust, drafts_SD)
        return jnp.where(adjust.on[:, None, None], changed_SPV, logits_SPV)

    return jax.lax.cond(jnp.any(adjust.on), some, lambda x: x, logits_SPV)


def _changed(logits_SPV, adjust, drafts_SD):
    slots, places, vocab = logits_SPV.shape
    token_11V = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    drafted_SDV = (drafts_SD[..., None] == token_11V).astype(jnp.int32)
    none_S1V = jnp.zeros((slots, 1, vocab), jnp.int32)
    before_SPV = jnp.concatenate([none_S1V, jnp.cumsum(drafted_SDV, axis=1)], axis=1)
    count_SPV = adjust.seen[:, None] // 2 + before_SPV
    seen_SPV = (count_SPV > 0) | (adjust.seen[:, None] % 2 > 0)

    def each(values_S):
        return jnp.asarray(values_S)[:, None, None]

    logits_SPV = logits_SPV + adjust.bias[:, None]
    factor_S11 = each(adjust.repetition)
    repeated_SPV = jnp.where(logits_SPV > 0, logits_SPV / factor_S11, logits_SPV * factor_S11)
    logits_SPV = jnp.where(seen_SPV, repeated_SPV, logits_SPV)
    off_SPV = each(adjust.frequency) * count_SPV.astype(jnp.float32)
    there_SPV = (count_SPV > 0).astype(jnp.float32)
    return logits_SPV - off_SPV - each(adjust.presence) * there_SPV
