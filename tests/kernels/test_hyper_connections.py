"""mHC against numpy loops, and what Sinkhorn promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels.hyper_connections import api


def numpy_pre(h, fn, base, scale, iterations, eps, rms_eps):
    m = h.shape[0]
    v = h.reshape(-1).astype(np.float64)
    mix = fn.astype(np.float64) @ v / np.sqrt(np.mean(v * v) + rms_eps)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    pre = sigmoid(mix[:m] * scale[0] + base[:m]) + eps
    post = 2 * sigmoid(mix[m : 2 * m] * scale[1] + base[m : 2 * m])
    a = (mix[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m)
    a = np.exp(a - a.max(1, keepdims=True))
    a = a / a.sum(1, keepdims=True) + eps
    a = a / (a.sum(0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(1, keepdims=True) + eps)
        a = a / (a.sum(0, keepdims=True) + eps)
    return pre @ h, post, a


@pytest.mark.parametrize("m", [2, 4, 8])
def test_against_numpy(m):
    rng = np.random.default_rng(m)
    d, rows = 12, (2 + m) * m
    h = rng.normal(size=(2, 3, m, d)).astype(np.float32)
    fn = rng.normal(size=(rows, m * d)).astype(np.float32)
    base, scale = rng.normal(size=rows).astype(np.float32), np.array([1, 0.5, 2], np.float32)
    options = {"iterations": 20, "eps": 1e-6, "rms_eps": 1e-6}
    u, post, comb = api.pre(*(jnp.asarray(x) for x in (h, fn, base, scale)), **options)
    y = rng.normal(size=(2, 3, d)).astype(np.float32)
    new = api.post(jnp.asarray(y), jnp.asarray(h), post, comb)
    for b in range(2):
        for t in range(3):
            wanted = numpy_pre(h[b, t], fn, base, scale, **options)
            np.testing.assert_allclose(u[b, t], wanted[0], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(post[b, t], wanted[1], atol=1e-5)
            np.testing.assert_allclose(comb[b, t], wanted[2], atol=1e-5)
            streams = wanted[1][:, None] * y[b, t] + wanted[2].T @ h[b, t]
            np.testing.assert_allclose(new[b, t], streams, atol=1e-5, rtol=1e-5)


def test_matrix_is_doubly_stochastic():
    h = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
    fn = 0.1 * jax.random.normal(jax.random.key(1), (24, 32))
    _, _, comb = api.pre(h, fn, jnp.zeros(24), jnp.ones(3), iterations=20, eps=1e-6, rms_eps=1e-6)
    np.testing.assert_allclose(comb.sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(comb.sum(-2), 1, atol=1e-4)
