"""The few numbers of a token inside a TPU kernel: (2+M)M logits to weights, and back.

References are [X, T]: one row per number, tokens on lanes. Rows 0..M are pre, M..2M are post, the
rest the matrix, row major; a matrix is [M, M, T], so that a Sinkhorn step is a few vector
operations.
"""

import jax

from v4jax.kernels.hyper_connections import sinkhorn


def _matrix(rows_ref, matrix_ref):
    """Copies rows 2M.. of [X, T] into [M, M, T] and loads it."""
    m = matrix_ref.shape[0]
    for i in range(m):
        matrix_ref[i] = rows_ref[(2 + i) * m : (3 + i) * m, :]
    return matrix_ref[...]


def write_weights(logits_XT, weights_ref, matrix_ref, iterations, eps):
    """weights = pre, post and the nearly doubly stochastic matrix of the logits."""
    m = matrix_ref.shape[0]
    weights_ref[...] = logits_XT
    a = sinkhorn.forward(_matrix(weights_ref, matrix_ref), iterations, eps)
    weights_ref[:m] = jax.nn.sigmoid(weights_ref[:m]) + eps
    weights_ref[m : 2 * m] = 2.0 * jax.nn.sigmoid(weights_ref[m : 2 * m])
    for i in range(m):
        weights_ref[(2 + i) * m : (3 + i) * m, :] = a[i]


def write_dlogits(logits_XT, dweights_ref, dlogits_ref, pre_ref, scratch, iterations, eps):
    """The gradient of the logits, and `pre` again.

    Args:
      dweights_ref: [X, T] gradients of the weights. dlogits_ref: [X, T], written.
      pre_ref: [>=M, T], rows 0..M written.
      scratch: (matrix [M, M, T], iterates [iterations, M, M, T]).
    """
    matrix_ref, iterate_ref = scratch
    m = matrix_ref.shape[0]
    dlogits_ref[...] = logits_XT
    logits, da = _matrix(dlogits_ref, matrix_ref), _matrix(dweights_ref, matrix_ref)
    da = sinkhorn.backward(logits, da, iterate_ref, iterations, eps)
    pre = jax.nn.sigmoid(dlogits_ref[:m])
    post = jax.nn.sigmoid(dlogits_ref[m : 2 * m])
    pre_ref[:m] = pre + eps
    dlogits_ref[:m] = dweights_ref[:m] * pre * (1.0 - pre)
    dlogits_ref[m : 2 * m] = dweights_ref[m : 2 * m] * 2.0 * post * (1.0 - post)
    for i in range(m):
        dlogits_ref[(2 + i) * m : (3 + i) * m, :] = da[i]
