"""Derivatives that are written down: of a turn, and of a norm followed by a turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.model import rope
from v4jax.ops.head_norm import norm_and_rope
from v4jax.ops.rms_norm import inverse_rms
from v4jax.ops.rope import rotate, rotated

EPS = 1e-6


def arguments(dtype):
    """x [2,5,3,24], angles of 8 channel pairs for each of its 5 places, and weights of a sum."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(2, 5, 3, 24)), dtype) for _ in range(2))
    frequency = np.float32(10.0) ** -np.arange(8, dtype=np.float32)
    angles = rope.rotations(frequency, jnp.arange(5, dtype=jnp.int32)[None] + 7)
    return x, [angle[:, :, None] for angle in angles], weight.astype(jnp.float32)


def gradient(f, x, weight):
    return jax.jit(jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32) * weight)))(x)


@pytest.mark.parametrize("inverse", [False, True])
def test_of_a_turn(inverse):
    x, (cos, sin), weight = arguments("float32")
    found = gradient(lambda x: rotate(x, cos, sin, "float32", inverse), x, weight)
    sign = -1 if inverse else 1
    wanted = gradient(lambda x: rotated(x, cos, sign * sin), x, weight)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def plain(x, cos, sin):
    return rotated(x * inverse_rms(x, EPS)[..., None], cos, sin)


def test_of_a_norm_and_a_turn():
    x, angles, weight = arguments("float32")
    found = gradient(lambda x: norm_and_rope(EPS, "float32", x, *angles), x, weight)
    wanted = gradient(lambda x: plain(x, *angles), x, weight)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_in_bfloat16_it_is_within_its_rounding():
    x, angles, weight = arguments("bfloat16")
    found = gradient(lambda x: norm_and_rope(EPS, "bfloat16", x, *angles), x, weight)
    assert found.dtype == jnp.bfloat16
    wanted = np.asarray(gradient(lambda x: plain(x, *angles), x.astype(jnp.float32), weight))
    # Three roundings of 2^-9: of the incoming gradient, of the result that is read, of the outcome.
    error = np.abs(np.asarray(found.astype(jnp.float32)) - wanted).max()
    assert error < 3 * 2**-9 * np.abs(wanted).max()
