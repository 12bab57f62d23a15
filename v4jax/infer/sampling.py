"""From logits to the next token: greedy, temperature, top-k, top-p, min-p.

Pure functions of float32 logits [B, V] (dimension key in `v4jax/model/transformer.py`). Each filter
returns the logits with minus infinity where a token is out. Their order is top-k, temperature,
top-p, min-p: top-p counts the mass of what top-k left. Every tie goes to the lower token id.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.errors import InputError


class Sampling(NamedTuple):
    """How a token is drawn; a pytree, so that other values compile nothing anew.

    Attributes:
      temperature: 0 takes the most likely token, whatever the filters; so does one below 2.4e-38,
        which float32 cannot divide by.
      top_k: how many of the most likely tokens stay; 0 leaves all.
      top_p: the fewest most likely tokens whose mass reaches this stay; 1 leaves all.
      min_p: tokens less likely than this times the most likely one go; 0 leaves all, and so does
        one below 1.2e-38.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = Sampling()


def check(sampling: Sampling) -> Sampling:
    """The same values as plain numbers, or an `InputError` that names the one out of range."""
    for name, value in sampling._asdict().items():
        _check_number(name, value)
    temperature, top_k, top_p, min_p = sampling
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise InputError(f"temperature is {temperature}; expected 0 (greedy) or a positive number")
    if not 0 <= top_k < 2**31 or top_k != int(top_k):
        raise InputError(f"top_k is {top_k}; expected 0 (all tokens) or a positive whole number")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; expected more than 0 and at most 1 (all tokens)")
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p is {min_p}; expected 0 (all tokens) to 1")
    return Sampling(_temperature(temperature), int(top_k), float(top_p), float(min_p))


def _check_number(name, value):
    """Numbers, also numpy's and jax's scalars; None and True are none."""
    scalar = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not scalar and not (getattr(value, "shape", None) == () and value.dtype.kind in "iuf"):
        raise InputError(
            f"{name} is {repr(value)[:200]}; expected a number: leave it out for the default, "
            f"{Sampling._field_defaults[name]}"
        )


def _temperature(value):
    """A temperature that float32 can divide by; one too near 0 is 0, the limit: greedy."""
    smallest = 2 * float(np.finfo(np.float32).tiny)  # its half is a normal number
    # XLA may multiply by the reciprocal, which has to be a normal number too.
    return 0.0 if value < smallest else min(float(value), 1 / smallest)


def sample(logits_BV, keys_B, sampling: Sampling):
    """One token a row, int32 [B].

    Args:
      logits_BV: float32.
      keys_B: typed random keys, one a row, so that no row's draw depends on another row.
      sampling: values in range (see `check`): numbers for all rows, or arrays [B].
    """
    # Branches rather than static arguments: one program serves every setting, and a greedy step
    # pays for no filter.
    some_row_draws = jnp.any(sampling.temperature > 0)
    return jax.lax.cond(some_row_draws, _draw, _greedy, logits_BV, keys_B, sampling)


def row_keys(key, rows: int, step):
    """The keys of one step: `fold_in(fold_in(key, row), step)`."""

    def row_key(row):
        return jax.random.fold_in(jax.random.fold_in(key, row), step)

    return jax.vmap(row_key)(jnp.arange(rows, dtype=jnp.int32))


def _greedy(logits_BV, keys_B, sampling):
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _draw(logits_BV, keys_B, sampling):
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, sampling))
    greedy_B = _greedy(logits_BV, keys_B, sampling)
    return jnp.where(sampling.temperature > 0, drawn_B.astype(jnp.int32), greedy_B)


def filtered(logits_BV, sampling: Sampling):
    """Logits over the temperature, minus infinity where a token is out.

    A filter that is off leaves a row's bits as they are. Rows of temperature 0 are unspecified.
    """
    temperature, top_k, top_p, min_p = (jnp.reshape(jnp.asarray(x), (-1, 1)) for x in sampling)
    # Before the temperature, which changes no order but may flush what tells two logits apart to 0.
    kept_BV = _where_on(top_k > 0, filter_top_k, logits_BV, top_k)
    logits_BV = with_temperature(kept_BV, jnp.where(temperature > 0, temperature, 1.0))
    logits_BV = _where_on(top_p < 1, filter_top_p, logits_BV, top_p, kept_BV)
    return _where_on(min_p > 0, filter_min_p, logits_BV, min_p)


def _where_on(on_B1, filter_rows, logits_BV, *values):
    """The filter on the rows where it is on; it costs nothing where it is on in none."""

    def some(logits_BV, *values):
        return jnp.where(on_B1, filter_rows(logits_BV, *values), logits_BV)

    def none(logits_BV, *values):
        return logits_BV

    return jax.lax.cond(jnp.any(on_B1), some, none, logits_BV, *values)


def with_temperature(logits_BV, temperature):
    """Logits over the temperature, the largest moved to 0 first so that none overflows upward."""
    half_BV = 0.5 * logits_BV  # exact, and a difference of halves never overflows
    return (half_BV - jnp.max(half_BV, axis=-1, keepdims=True)) / (0.5 * temperature)


def filter_top_k(logits_BV, top_k):
    """Keeps the `top_k` (1 or more) largest logits of each row."""
    ones_BV = jnp.ones_like(logits_BV)
    return _filter(logits_BV, _heaviest(logits_BV, ones_BV, jnp.asarray(top_k, jnp.float32)))


def filter_top_p(logits_BV, top_p, order_BV=None):
    """Keeps the fewest most likely tokens whose mass is at least `top_p`, never fewer than one.

    order_BV: what tells which of two tokens is likelier, before the temperature; the logits.
    """
    order_BV = logits_BV if order_BV is None else order_BV
    # XLA flushes what is below float32's normal numbers to 0, a mass that no token at all reaches.
    target = jnp.maximum(jnp.asarray(top_p, jnp.float32), jnp.finfo(jnp.float32).tiny)
    return _filter(logits_BV, _heaviest(order_BV, jax.nn.softmax(logits_BV), target))


def filter_min_p(logits_BV, min_p):
    """Keeps tokens at least `min_p` times as likely as the most likely one."""
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.asarray(min_p, jnp.float32))
    return _filter(logits_BV, logits_BV >= floor_B1)


def _filter(logits_BV, keep_BV):
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def _heaviest(logits_BV, weight_BV, target):
    """Marks the largest logits, as many as it takes for their weights to reach the target.

    The smallest logit that is needed is found bit by bit, from the top, in 32 sums over the
    vocabulary; sorting 129,280 logits takes a CPU twenty times as long.
    """
    order_BV = _ordered_bits(logits_BV)

    def set_bit(i, threshold_B1):
        higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough_B1 = _weight_where(order_BV >= higher_B1, weight_BV) >= target
        return jnp.where(enough_B1, higher_B1, threshold_B1)

    threshold_B1 = jnp.zeros_like(order_BV[:, :1])
    threshold_B1 = jax.lax.fori_loop(0, 32, set_bit, threshold_B1)
    above_BV, tied_BV = order_BV > threshold_B1, order_BV == threshold_B1
    tied_weight_BV = jnp.where(tied_BV, weight_BV, 0)
    before_BV = jnp.cumsum(tied_weight_BV, axis=-1) - tied_weight_BV
    needed_BV = _weight_where(above_BV, weight_BV) + before_BV < target
    return above_BV | (tied_BV & needed_BV)


def _weight_where(mask_BV, weight_BV):
    return jnp.sum(jnp.where(mask_BV, weight_BV, 0), axis=-1, keepdims=True)


def _ordered_bits(x):
    """float32 to uint32 in the same order: negative numbers count backwards as bits."""
    x = jnp.where(jnp.abs(x) < jnp.finfo(jnp.float32).tiny, 0.0, x)  # equal, as XLA compares them
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
