"""The compressor's pooling. What entries it makes, and of which tokens: test_golden, parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.ops.softmax_sum import softmax_sum


@pytest.mark.parametrize("span", [8, 128])  # written out, and a reduction
def test_pooling_and_its_gradients(span):
    """Beside automatic differentiation; the first entry's first half is absent."""
    keys = jax.random.split(jax.random.key(span), 3)
    c, gate = (jax.random.normal(key, (2, 5, span, 7)) for key in keys[:2])
    gate = gate.at[:, 0, : span // 2].set(-jnp.inf)
    g = jax.random.normal(keys[2], (2, 5, 7))

    def of(function):
        out, backward = jax.vjp(function, c, gate)
        return out, *backward(g)

    found = of(softmax_sum)
    wanted = of(lambda c, gate: jnp.sum(jax.nn.softmax(gate, axis=2) * c, axis=2))
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
