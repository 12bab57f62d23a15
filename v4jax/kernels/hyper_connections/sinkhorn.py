"""Sinkhorn's rounds and their gradient, in a kernel or outside: [M, M, T], tokens last."""

import functools

import jax
import jax.numpy as jnp

ROWS, COLUMNS = 1, 0  # the axis that a row's, a column's sum runs over


def _inverse_sum(a_MMT, axis, eps):
    return 1.0 / (jnp.sum(a_MMT, axis=axis, keepdims=True) + eps)


def softmax(logits_MMT):
    """Over each row."""
    e = jnp.exp(logits_MMT - jnp.max(logits_MMT, axis=ROWS, keepdims=True))
    return e * _inverse_sum(e, ROWS, 0.0)


def _round(a_MMT, eps):
    a_MMT = a_MMT * _inverse_sum(a_MMT, ROWS, eps)
    return a_MMT * _inverse_sum(a_MMT, COLUMNS, eps)


def _begin(logits_MMT, eps):
    """The matrix that the rounds begin with."""
    a = softmax(logits_MMT) + eps
    return a * _inverse_sum(a, COLUMNS, eps)


def forward(logits_MMT, iterations, eps):
    a = _begin(logits_MMT, eps)
    return jax.lax.fori_loop(0, iterations - 1, lambda _, a: _round(a, eps), a)


def backward(logits_MMT, da_MMT, iterate_ref, iterations, eps):
    """d(logits). The iterates are computed again, into iterate_ref [iterations, M, M, T]."""

    def again(k, a):
        iterate_ref[k, :, :, :] = a
        return _round(a, eps)

    def step(back, da):
        return _round_backward(iterate_ref[iterations - 1 - back, :, :, :], da, eps)

    jax.lax.fori_loop(1, iterations, again, _begin(logits_MMT, eps))
    da_MMT = jax.lax.fori_loop(0, iterations - 1, step, da_MMT)
    return _begin_backward(logits_MMT, da_MMT, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def outside(logits_MMT, iterations, eps):
    """`forward` for plain XLA, whose gradient keeps no more than a matrix a round.

    JAX's own would keep several arrays a round, and XLA:CPU copies each of them.
    """
    return forward(logits_MMT, iterations, eps)


def _outside_forward(logits_MMT, iterations, eps):
    return forward(logits_MMT, iterations, eps), logits_MMT


def _outside_backward(iterations, eps, logits_MMT, da_MMT):
    _, iterates = jax.lax.scan(
        lambda a, _: (_round(a, eps), a), _begin(logits_MMT, eps), length=iterations - 1
    )
    da_MMT, _ = jax.lax.scan(
        lambda da, a: (_round_backward(a, da, eps), None), da_MMT, iterates, reverse=True
    )
    return (_begin_backward(logits_MMT, da_MMT, eps),)


outside.defvjp(_outside_forward, _outside_backward)


def _round_backward(a_MMT, da_MMT, eps):
    """d(a) of `_round`."""
    rows = _inverse_sum(a_MMT, ROWS, eps)
    b = a_MMT * rows
    columns = _inverse_sum(b, COLUMNS, eps)
    da_MMT = _normalised_backward(da_MMT, b * columns, columns, COLUMNS)
    return _normalised_backward(da_MMT, b, rows, ROWS)


def _begin_backward(logits_MMT, da_MMT, eps):
    """d(logits) of `_begin`."""
    p = softmax(logits_MMT)
    columns = _inverse_sum(p + eps, COLUMNS, eps)
    da_MMT = _normalised_backward(da_MMT, (p + eps) * columns, columns, COLUMNS)
    return p * (da_MMT - jnp.sum(da_MMT * p, axis=ROWS, keepdims=True))


def _normalised_backward(db, b, inverse, axis):
    """d(a) of b = a * inverse, inverse = 1 / (sum of a over the axis + eps)."""
    return inverse * (db - jnp.sum(db * b, axis=axis, keepdims=True))
