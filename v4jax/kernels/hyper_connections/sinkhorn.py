"""Sinkhorn's rounds and their gradient inside a kernel, on matrices [M, M, T], tokens last."""

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


def forward(logits_MMT, iterations, eps):
    a = softmax(logits_MMT) + eps
    a = a * _inverse_sum(a, COLUMNS, eps)
    return jax.lax.fori_loop(0, iterations - 1, lambda _, a: _round(a, eps), a)


def backward(logits_MMT, da_MMT, iterate_ref, iterations, eps):
    """d(logits). The iterates are computed again, into iterate_ref [iterations, M, M, T]."""
    p = softmax(logits_MMT)
    first = p + eps

    def again(k, a):
        iterate_ref[k, :, :, :] = a
        return _round(a, eps)

    def step(back, da):
        a = iterate_ref[iterations - 1 - back, :, :, :]
        rows = _inverse_sum(a, ROWS, eps)
        b = a * rows
        columns = _inverse_sum(b, COLUMNS, eps)
        da = _normalised_backward(da, b * columns, columns, COLUMNS)
        return _normalised_backward(da, b, rows, ROWS)

    columns = _inverse_sum(first, COLUMNS, eps)
    jax.lax.fori_loop(1, iterations, again, first * columns)
    da_MMT = jax.lax.fori_loop(0, iterations - 1, step, da_MMT)
    da_MMT = _normalised_backward(da_MMT, first * columns, columns, COLUMNS)
    return p * (da_MMT - jnp.sum(da_MMT * p, axis=ROWS, keepdims=True))


def _normalised_backward(db, b, inverse, axis):
    """d(a) of b = a * inverse, inverse = 1 / (sum of a over the axis + eps)."""
    return inverse * (db - jnp.sum(db * b, axis=axis, keepdims=True))
