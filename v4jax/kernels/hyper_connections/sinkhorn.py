"""Sinkhorn's rounds and their gradient, in a kernel or outside: [M, M, T], tokens last."""

import functools

import jax
import jax.numpy as jnp

from v4jax.ops import varying

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
    """`forward` for plain XLA: the rounds scale rows and columns, [M, T] instead of [M, M, T].

    A round multiplies rows by 1 / (their sum + eps), then columns. So after any number of them the
    matrix is diag(r) A diag(c), A the one they began with, and a round changes r and c alone:
    r <- r / (r (A c) + eps), c <- c / (c (A^T r) + eps).
    """
    a_MMT = _begin(logits_MMT, eps)
    r_MT, c_MT = jax.lax.fori_loop(
        0, iterations - 1, lambda _, rc: _scale(a_MMT, *rc, eps), _ones(a_MMT)
    )
    return r_MT[:, None] * a_MMT * c_MT[None]


def _ones(a_MMT):
    return varying.with_axes_of((jnp.ones_like(a_MMT[0]), jnp.ones_like(a_MMT[0])), a_MMT)


def _scale(a_MMT, r_MT, c_MT, eps):
    """r and c after a round."""
    r_MT = r_MT / (r_MT * _times(a_MMT, c_MT) + eps)
    return r_MT, c_MT / (c_MT * _times_transposed(a_MMT, r_MT) + eps)


def _times(a_MMT, c_MT):
    """A c for each token, term by term: a sum over an axis would be a pass of its own."""
    return sum(a_MMT[:, j] * c_MT[None, j] for j in range(a_MMT.shape[1]))


def _times_transposed(a_MMT, r_MT):
    return sum(a_MMT[i] * r_MT[None, i] for i in range(a_MMT.shape[0]))


def _outside_forward(logits_MMT, iterations, eps):
    return outside(logits_MMT, iterations, eps), logits_MMT


def _outside_backward(iterations, eps, logits_MMT, dout_MMT):
    """From the last round to the first. All rounds' r and c [iterations, M, T] are computed again.

    The loops read them where they stand: carried from round to round, each would be copied.
    """
    a_MMT = _begin(logits_MMT, eps)
    start = jnp.ones((iterations, *a_MMT.shape[1:]), a_MMT.dtype)
    start = varying.with_axes_of(start, a_MMT)

    def again(k, history):
        new = _scale(a_MMT, *_at(history, k - 1), eps)
        return jax.tree.map(lambda x, row: x.at[k].set(row), history, new)

    history = jax.lax.fori_loop(1, iterations, again, (start, start))

    def step(back, carry):
        """From the gradients after round k to those before it."""
        dr, dc, da = carry
        k = iterations - 1 - back
        (r, c), (r_before, c_before) = _at(history, k), _at(history, k - 1)
        # c = c_before / s with s = c_before (A^T r) + eps: dc/dc_before = eps / s^2, and
        # d(A^T r) = -c^2 dc. The same for r.
        dsum = -dc * c * c
        dc = dc * eps * (c / c_before) ** 2
        da = da + r[:, None] * dsum[None]
        dr = dr + _times(a_MMT, dsum)
        dsum = -dr * r * r
        dr = dr * eps * (r / r_before) ** 2
        da = da + dsum[:, None] * c_before[None]
        dc = dc + _times_transposed(a_MMT, dsum)
        return dr, dc, da

    r, c = _at(history, iterations - 1)
    weighed = dout_MMT * a_MMT
    carry = (
        _times(weighed, c),
        _times_transposed(weighed, r),
        dout_MMT * r[:, None] * c[None],
    )
    *_, da_MMT = jax.lax.fori_loop(0, iterations - 1, step, carry)
    return (_begin_backward(logits_MMT, da_MMT, eps),)


outside.defvjp(_outside_forward, _outside_backward)


def _at(history, k):
    """r and c after k rounds."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), history)


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
