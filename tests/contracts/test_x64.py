"""With JAX_ENABLE_X64 the model computes what it computes without: 32 bits, the same numbers."""

import functools

import jax
import numpy as np
import optax
import pytest

import v4jax
from tests.support.tiny import tiny_config, tiny_model
from tests.support.train_models import small_batch, small_model
from v4jax.config import CSA
from v4jax.model.transformer import Transformer
from v4jax.train.step import Rates, StepConfig, new_state, train_step

TOKENS = np.arange(40).reshape(2, 20) * 7 % 331  # int64, as numpy makes them


def both(compute):
    """The result with and without 64-bit types; no leaf of the former has one."""
    plain = compute()
    with jax.enable_x64(True):
        wide = compute()
    found = {x.dtype.name for x in jax.tree.leaves(wide) if hasattr(x, "dtype")}
    assert not found & {"int64", "uint64", "float64"}, found
    return plain, wide


def close(found, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-5
        ),
        found,
        wanted,
    )


@pytest.mark.parametrize("numerics", [None, pytest.param("native", marks=pytest.mark.slow)])
def test_everything_traces(numerics):
    """Shapes and types alone, nothing compiled: forward, prefill, decode, rollback, gradient."""
    model = Transformer(tiny_config(layers=(CSA,)), numerics=numerics)
    variables = model.abstract_variables()
    cache = model.init_cache(2, 64, rollback=2)

    def loss(variables, tokens):
        return model.apply(variables, tokens, mtp=True).logits.sum()

    def decode(variables, cache, tokens):
        cache = model.apply(variables, tokens, cache=cache, logits="last").cache
        return model.apply(variables, tokens[:, :1], cache=cache).cache.rollback(1)

    with jax.enable_x64(True):
        shapes = jax.eval_shape(jax.grad(loss), variables, TOKENS)
        assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype("float32")}
        found = jax.eval_shape(decode, variables, cache, TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), found, cache)


@pytest.mark.slow
def test_forward_with_every_output():
    model, variables = tiny_model()
    names = ("chosen", "router_experts", "index_scores", "indexer_loss", "router_load")
    run = jax.jit(functools.partial(model.apply, mtp=True, aux=names))
    close(*both(lambda: run(variables, TOKENS)))


@pytest.mark.slow
def test_generate():
    """The command's own case: prefill in chunks, decode, sampling."""
    model, variables = tiny_model()
    options = {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.01}
    plain, wide = both(lambda: v4jax.generate(model, variables, list(TOKENS), **options))
    assert wide.tokens == plain.tokens


@pytest.mark.slow
def test_train_step():
    model, variables = small_model()
    optimizer, batch = optax.sgd(1.0), small_batch()
    step = jax.jit(functools.partial(train_step, model, optimizer, StepConfig(parts=2)))
    rates = Rates(np.float32(0.1), np.float32(0.3))

    def run():
        return step(new_state(variables["params"], variables["buffers"], optimizer), batch, rates)

    close(*both(run))


@pytest.mark.slow
def test_init_makes_the_same_variables():
    model, _ = tiny_model()
    plain, wide = both(lambda: jax.jit(model.init)(jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, plain, wide)
