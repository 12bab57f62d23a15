"""The few numbers of a token inside a GPU kernel: (2+M)M logits to weights, and back.

Refs are [X, T]: one row a number, tokens last, about a token a thread. Rows 0..M are pre, M..2M
post, the rest the matrix, row major, taken as [M, M, T]. The backward pass keeps the Sinkhorn
iterates of its own recomputation in a buffer that the same threads write and read (80 M*M bytes a
token, far less than its streams).
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connections import sinkhorn


def _parts(m, tokens):
    """Indices of the rows of pre, of post and of the matrix, each with its tokens."""
    token = jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 0)
    i, j, matrix_token = (
        jax.lax.broadcasted_iota(jnp.int32, (m, m, tokens), axis) for axis in range(3)
    )
    return (row, token), (m + row, token), ((2 + i) * m + j, matrix_token)


def mixing_kernel(
    raw_ref, square_ref, base_ref, scale_ref, mixed_ref, norm_ref, weights_ref, *, m, d, options
):
    """Logits, rms factors and weights from the partial sums over channels."""
    iterations, eps, rms_eps = options
    split, tokens = square_ref.shape
    square = functools.reduce(jnp.add, [square_ref[s, :] for s in range(split)])
    norm = jax.lax.rsqrt(square / (m * d) + rms_eps)
    norm_ref[0, :] = norm

    def logits(rows, token):
        raw = functools.reduce(jnp.add, [raw_ref[s, rows, token] for s in range(split)])
        mixed = raw * norm.reshape((1,) * (rows.ndim - 1) + (tokens,))
        mixed_ref[rows, token] = mixed
        return mixed * scale_ref[rows] + base_ref[rows]

    pre, post, matrix = _parts(m, tokens)
    weights_ref[pre] = jax.nn.sigmoid(logits(*pre)) + eps
    weights_ref[post] = 2.0 * jax.nn.sigmoid(logits(*post))
    weights_ref[matrix] = sinkhorn.forward(logits(*matrix), iterations, eps)


def mixing_backward_kernel(
    mixed_ref,
    norm_ref,
    dweights_ref,
    base_ref,
    scale_ref,
    dlogits_ref,
    coefficient_ref,
    iterate_ref,
    *,
    m,
    d,
    options,
):
    """Gradients of the logits, and by row: pre, what the rms factor leaves, draw = d(fn @ v).

    Args:
      dweights_ref: [X, T], gradients of the weights.
      dlogits_ref: [X, T]. coefficient_ref: [M + 1 + X, T]. iterate_ref: [iterations, M, M, T].
    """
    iterations, eps = options
    tokens = norm_ref.shape[1]
    norm = norm_ref[0, :]
    along = jnp.zeros((tokens,), jnp.float32)
    for part, (rows, token) in enumerate(_parts(m, tokens)):
        mixed, scale = mixed_ref[rows, token], scale_ref[rows]
        logits, dweights = mixed * scale + base_ref[rows], dweights_ref[rows, token]
        if part == 2:
            dlogits = sinkhorn.backward(logits, dweights, iterate_ref, iterations, eps)
        else:
            gate = jax.nn.sigmoid(logits)
            dlogits = (1.0 + part) * dweights * gate * (1.0 - gate)
        if part == 0:
            coefficient_ref[rows, token] = gate + eps
        dlogits_ref[rows, token] = dlogits
        dmixed = dlogits * scale
        spread = norm.reshape((1,) * (rows.ndim - 1) + (tokens,))
        coefficient_ref[m + 1 + rows, token] = dmixed * spread
        product = dmixed * mixed
        for _ in range(rows.ndim - 1):
            product = jnp.sum(product, axis=0)
        along = along + product
    coefficient_ref[m, :] = norm * norm * along / (m * d)
