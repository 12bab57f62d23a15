"""Sums of products, and the norm whose gradient is made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.ops import products
from v4jax.ops.rms_norm import inverse_rms, rms_norm

EPS = 1e-6


def draw(*shapes, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 64), (1, 9, 4, 32)])
def test_sums_of_products(shape, dtype):
    a, b = draw(shape, shape, dtype=dtype)
    wide = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    found = jax.jit(lambda a, b: (products.over_channels(a, b), products.over_rows(a, b)))(a, b)
    wanted = wide.sum(-1), wide.reshape(-1, shape[-1]).sum(0)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(wide).sum() ** 0.5)


def test_sums_of_outer_products():
    a, b = draw((37, 53), (37, 12))
    found = jax.jit(products.outer)(a, b)
    wanted = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("sizes", [(37, 12, 53), (37, 53, 12)])
def test_rows_times_a_matrix(sizes):
    """With gradients, beside automatic differentiation."""
    n, d, f = sizes
    x, w, g = draw((n, d), (f, d), (n, f))

    def of(function):
        out, backward = jax.vjp(function, x, w)
        return out, *backward(g)

    found = jax.jit(lambda: of(products.by_rows))()
    wanted = jax.jit(lambda: of(lambda x, w: jnp.dot(x, w.T)))()
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_norm(dtype):
    """Beside automatic differentiation of the same formula."""
    x, g = draw((2, 19, 64), (2, 19, 64))
    (scale,) = draw((64,))
    x = x.astype(dtype)

    def plain(x, scale):
        wide = x.astype(jnp.float32)
        return wide * inverse_rms(x, EPS)[..., None] * scale[None, None]

    def of(function):
        out, backward = jax.vjp(function, x, scale)
        return out, *backward(g)

    found = jax.jit(lambda: of(lambda x, scale: rms_norm(EPS, x, scale)))()
    wanted = jax.jit(lambda: of(plain))()
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        bound = 1e-6 if dtype == "float32" else 1e-2  # an input's gradient is rounded to bf16
        assert np.abs(mine - theirs).max() <= bound * np.abs(theirs).max()
