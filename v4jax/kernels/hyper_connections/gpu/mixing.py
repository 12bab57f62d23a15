"""The few numbers of a token inside a GPU kernel: (2+M)M logits to weights, and back.

References are [X, T]: one row per number, tokens last, about one token per thread. Rows 0..M are
pre, M..2M post, the rest the matrix, row major, taken as [M, M, T]. The backward pass keeps the
Sinkhorn iterates of its own recomputation in a buffer that the same threads write and read (80 M*M
bytes per token, far less than its streams).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connections import sinkhorn
from v4jax.kernels.hyper_connections.arguments import Mixed


def _parts(m, tokens):
    """Indices of the rows of pre, of post and of the matrix, each with its tokens."""
    token = jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 1)
    row = jax.lax.broadcasted_iota(jnp.int32, (m, tokens), 0)
    i, j, matrix_token = (
        jax.lax.broadcasted_iota(jnp.int32, (m, m, tokens), axis) for axis in range(3)
    )
    return (row, token), (m + row, token), ((2 + i) * m + j, matrix_token)


class Partial(NamedTuple):
    """Sums over some of the channels, for v a token's streams: fn @ v and v @ v."""

    raw: Any
    square: Any


class RowGrads(NamedTuple):
    """What `mixing_backward_kernel` gives.

    Attributes:
      dlogits: [X, N].
      coefficient: [M + 1 + X, N], by row: pre, what the rms factor leaves, draw = d(fn @ v).
      iterate: [iterations, M, M, N], the Sinkhorn iterates: a buffer.
    """

    dlogits: Any
    coefficient: Any
    iterate: Any


def mixing_kernel(partial, base_ref, scale_ref, out: Mixed, *, m, d, options):
    """Logits, rms factors and weights from the partial sums over channels."""
    iterations, eps, rms_eps = options
    split, tokens = partial.square.shape
    square = functools.reduce(jnp.add, [partial.square[s, :] for s in range(split)])
    norm = jax.lax.rsqrt(square / (m * d) + rms_eps)
    out.norm[0, :] = norm

    def logits(rows, token):
        raw = functools.reduce(jnp.add, [partial.raw[s, rows, token] for s in range(split)])
        mixed = raw * norm.reshape((1,) * (rows.ndim - 1) + (tokens,))
        out.mixed[rows, token] = mixed
        return mixed * scale_ref[rows] + base_ref[rows]

    pre, post, matrix = _parts(m, tokens)
    out.weights[pre] = jax.nn.sigmoid(logits(*pre)) + eps
    out.weights[post] = 2.0 * jax.nn.sigmoid(logits(*post))
    out.weights[matrix] = sinkhorn.forward(logits(*matrix), iterations, eps)


def mixing_backward_kernel(
    saved, dweights_ref, base_ref, scale_ref, out: RowGrads, *, m, d, options
):
    """From the gradients of the weights [X, T] to those of the logits, and what `dh` takes."""
    iterations, eps = options
    tokens = saved.norm.shape[1]
    norm = saved.norm[0, :]
    along = jnp.zeros((tokens,), jnp.float32)
    for part, (rows, token) in enumerate(_parts(m, tokens)):
        mixed, scale = saved.mixed[rows, token], scale_ref[rows]
        logits, dweights = mixed * scale + base_ref[rows], dweights_ref[rows, token]
        if part == 2:
            dlogits = sinkhorn.backward(logits, dweights, out.iterate, iterations, eps)
        else:
            gate = jax.nn.sigmoid(logits)
            dlogits = (1.0 + part) * dweights * gate * (1.0 - gate)
        if part == 0:
            out.coefficient[rows, token] = gate + eps
        out.dlogits[rows, token] = dlogits
        dmixed = dlogits * scale
        spread = norm.reshape((1,) * (rows.ndim - 1) + (tokens,))
        out.coefficient[m + 1 + rows, token] = dmixed * spread
        product = dmixed * mixed
        for _ in range(rows.ndim - 1):
            product = jnp.sum(product, axis=0)
        along = along + product
    out.coefficient[m, :] = norm * norm * along / (m * d)
