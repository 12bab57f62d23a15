"""Index scores and their gradients: dense, and at given entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.selection import first
from v4jax.kernels.indexer_topk import api, cases, reference, xla

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
SCORED = {
    "tile": cases.Case(length=20, entries=300, topk=0),
    "odd": cases.Case(length=17, entries=129, topk=0, heads=3, width=24),
    "one": cases.Case(length=1, entries=1, topk=0, heads=1, width=1, batch=1),
}


def scores_and_gradients(function, q, weight, keys, g):
    scores, backward = jax.vjp(function, q, weight, keys)
    return dict(zip(("scores", "dq", "dweight", "dkeys"), (scores, *backward(g)), strict=True))


compiled = jax.jit(scores_and_gradients, static_argnums=0)


def of(implementation):
    return functools.partial(api.index_scores, implementation=implementation)


def cotangent(case):
    return jax.random.normal(jax.random.key(5), (case.batch, case.length, case.entries))


@pytest.mark.parametrize("name", first(["tile", "odd"], SCORED))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_and_gradients_in_float32(implementation, name):
    args = cases.arguments(SCORED[name])[:3]
    g = cotangent(SCORED[name])
    wanted = compiled(reference.index_scores, *args, g)
    for key, value in compiled(of(implementation), *args, g).items():
        scale = float(jnp.abs(wanted[key]).max())
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


def in_bf16(q, weight, keys):
    """The reference, every array of which is bf16."""
    dots = jnp.einsum("btiz,bcz->btic", q, keys)
    return jnp.einsum("btic,bti->btc", jax.nn.relu(dots), weight)


@pytest.fixture(scope="module")
def of_bf16():
    """Arguments, and what comes of them: exactly, and with every array rounded (not compiled)."""
    args, g = cases.arguments(SCORED["tile"], jnp.bfloat16)[:3], cotangent(SCORED["tile"])
    exact = compiled(reference.index_scores, *(x.astype(jnp.float32) for x in args), g)
    return args, g, exact, scores_and_gradients(in_bf16, *args, g.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_and_gradients_in_bfloat16(implementation, of_bf16):
    args, g, exact, rounded = of_bf16
    for key, value in scores_and_gradients(of(implementation), *args, g).items():
        error, allowed = (
            float(jnp.abs(x[key].astype(jnp.float32) - exact[key]).max())
            for x in ({key: value}, rounded)
        )
        assert error <= 2 * allowed, (key, error, allowed)
        assert allowed > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_through_the_chain_of_bf16(implementation):
    args = cases.arguments(SCORED["odd"], jnp.bfloat16)[:3]
    args = tuple(jnp.round(8 * x) / 8 for x in args)
    native = functools.partial(of(implementation), native=True)
    scores = jax.jit(native)(*args)
    wanted = jax.jit(functools.partial(reference.index_scores, native=True))(*args)
    # Summed in another order before the last rounding: the same, or the next bf16 number.
    np.testing.assert_allclose(scores, wanted, rtol=2.0**-7, atol=0)
    assert np.mean(np.asarray(scores) == np.asarray(wanted)) > 0.99
    np.testing.assert_array_equal(scores, scores.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("native", [False, True])
def test_dense_scores_a_tile_of_keys_at_a_time(native, monkeypatch):
    monkeypatch.setattr(xla, "DOTS", 2 * 20 * 4 * 70)
    args, g = cases.arguments(SCORED["tile"])[:3], cotangent(SCORED["tile"])
    # An eighth of a unit: dot products are exact in float32, and the chain rounds the same numbers.
    args = tuple(jnp.round(8 * x) / 8 for x in args)
    tiled, wanted = (
        jax.jit(lambda *a, of=of: of.index_scores(*a, native=native))(*args)
        for of in (xla, reference)
    )
    np.testing.assert_allclose(tiled, wanted, rtol=1e-5, atol=1e-5)
    found, gradients = (
        jax.jit(lambda *a, of=of: of.index_scores_gradient(*a, native=native))(*args, g)
        for of in (xla, reference)
    )
    for value, expected in zip(found, gradients, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "at"))
def test_gradients_through_the_chain_ignore_the_rounding(implementation):
    """As of scores whose rounded dots are constants plus what passes straight through."""
    case = SCORED["odd"]
    q, weight, keys = cases.arguments(case)[:3]
    g = cotangent(case)

    def straight(q, weight, keys):
        def through(x):
            return x + jax.lax.stop_gradient(reference._bf16(x) - x)

        dots = through(jnp.einsum("btiz,bcz->btic", q, keys))
        terms = through(jax.nn.relu(dots) * weight[..., None])
        return through(terms.sum(2))

    def tested(q, weight, keys):
        if implementation != "at":
            return api.index_scores(q, weight, keys, native=True, implementation=implementation)
        every = jnp.arange(case.entries)[None, None]
        every = jnp.broadcast_to(every, g.shape)
        return api.index_scores_at(q, weight, keys, every, native=True)

    wanted = compiled(straight, q, weight, keys, g)
    found = compiled(tested, q, weight, keys, g)
    for key in ("dq", "dweight", "dkeys"):
        scale = float(jnp.abs(wanted[key]).max())
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("block", [1 << 24, 1])
def test_scores_at_given_entries(block, monkeypatch):
    monkeypatch.setattr("v4jax.kernels.indexer_topk.chosen_scores.BLOCK", block)
    case = SCORED["tile"]
    args = cases.arguments(case)[:3]
    shape = (case.batch, case.length, 11)
    chosen = jax.random.randint(jax.random.key(6), shape, -3, case.entries)
    chosen = jnp.maximum(chosen, -1)
    g = jax.random.normal(jax.random.key(7), shape)

    def dense(*args):
        scores = reference.index_scores(*args)
        taken = jnp.take_along_axis(scores, jnp.maximum(chosen, 0), axis=-1)
        return jnp.where(chosen < 0, 0.0, taken)

    def sparse(*args):
        return api.index_scores_at(*args, chosen)

    wanted = compiled(dense, *args, g)
    assert np.any(chosen == -1)
    for key, value in compiled(sparse, *args, g).items():
        scale = float(jnp.abs(wanted[key]).max())
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


def test_scores_at_given_entries_keep_no_dense_array():
    case = cases.Case(length=256, entries=4096, topk=0, batch=1, heads=4, width=16)
    args = cases.arguments(case)[:3]
    chosen = jnp.zeros((1, case.length, 8), jnp.int32)

    def loss(*args):
        return api.index_scores_at(*args, chosen).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * case.length * case.entries
