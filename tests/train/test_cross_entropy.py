"""The cross-entropy in blocks against full logits, values and gradients, and what it holds."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.train import cross_entropy as module
from v4jax.train.cross_entropy import cross_entropy

TOKENS, WIDTH, VOCAB = 37, 12, 53


def inputs(dtype="float32"):
    key = jax.random.split(jax.random.key(0), 4)
    y = jax.random.normal(key[0], (TOKENS, WIDTH)).astype(dtype)
    table = jax.random.normal(key[1], (VOCAB, WIDTH))
    target = jax.random.randint(key[2], (TOKENS,), 0, VOCAB)
    weight = (jax.random.uniform(key[3], (TOKENS,)) > 0.3).astype(jnp.float32)
    return y, table, target, weight


def written_out(y, table, target, weight):
    logits = jnp.einsum("xd,vd->xv", y.astype(jnp.float32), table)
    right = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - right))


# One block, three of which the last reaches back, and the most that there can be.
@pytest.mark.parametrize("block", [1 << 23, 20 * TOKENS, 1])
def test_values_and_gradients(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    args = inputs()
    np.testing.assert_allclose(cross_entropy(*args), written_out(*args), rtol=1e-6)
    scaled = [
        jax.grad(lambda y, table, f=f: 0.7 * f(y, table, *args[2:]), (0, 1))(*args[:2])
        for f in (cross_entropy, written_out)
    ]
    for ours, wanted in zip(*scaled, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_correct(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 20 * TOKENS)
    y, table, target, weight = inputs()
    best = np.argmax(np.asarray(y) @ np.asarray(table).T, axis=1)
    target = target.at[:20].set(best[:20])
    wanted = weight[np.asarray(target) == best].sum()
    assert module.correct(y, table, target, weight) == wanted > 0


def test_bfloat16_states_get_bfloat16_gradients():
    y, *rest = inputs("bfloat16")
    assert jax.grad(cross_entropy)(y, *rest).dtype == jnp.bfloat16


def test_huge_logits_stay_finite():
    y, table, target, weight = inputs()
    value, gradient = jax.value_and_grad(cross_entropy)(1e4 * y, table, target, weight)
    assert jnp.isfinite(value) and bool(jnp.all(jnp.isfinite(gradient)))


def test_no_array_of_tokens_by_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1)
    jaxpr = jax.make_jaxpr(jax.grad(cross_entropy, (0, 1)))(*inputs())
    largest = max(sizes(jaxpr.jaxpr))
    assert largest <= max(TOKENS, VOCAB) * WIDTH < TOKENS * VOCAB


def sizes(jaxpr):
    """Elements of every array of a program, of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for sub in jex.jaxprs_in_params(equation.params):
            yield from sizes(sub)
