"""Flash and Pro at full size: shapes and programs, nothing allocated."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import pytest

import v4jax
from tests.support.selection import first
from v4jax.model.transformer import Transformer


def abstract(name, **options):
    model = Transformer(v4jax.get_config(name), **options)
    return model, model.abstract_variables()


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name, main, mtp", [("flash", 284.33e9, 6.61e9), ("pro", 1573.0e9, 25.84e9)]
)
def test_parameters_by_eval_shape(name, main, mtp):
    _, variables = abstract(name)
    params = dict(variables["params"])
    assert count(params.pop("mtp_0")) == pytest.approx(mtp, rel=1e-3)
    assert count(params) == pytest.approx(main, rel=2e-5 if name == "flash" else 1e-4)


@pytest.mark.parametrize("name, groups", [("flash", 4), ("pro", 4)])
def test_depth_is_scanned(name, groups):
    """20 (29) CSA + HCA pairs are one unit; the few odd layers in front are units of their own."""
    model, _ = abstract(name)
    cut = model.segments()
    assert len(cut) == groups
    assert sum(s.period * s.repeats for s in cut) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", first(["flash"], ["flash", "pro"]))
def test_prefill_and_decode_lower(name):
    """Lowered in well under a minute on two cores, a chunk of 4,096 tokens and one token."""
    model, variables = abstract(name, dtype="bfloat16")
    cache = jax.eval_shape(functools.partial(model.init_cache, 1, 131072))

    def call(variables, tokens, cache):
        out = model.apply(variables, tokens, cache=cache, logits="last")
        return out.logits, out.cache

    for length in (4096, 1):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        started = time.process_time()
        lowered = jax.jit(call, donate_argnums=2).lower(variables, tokens, cache)
        assert time.process_time() - started < 60
        assert len(lowered.as_text().splitlines()) < 30_000


def test_small_decodes_a_token():
    """What reviews in experiments/012_two_tiers, lowered."""
    model, variables = abstract("small")
    cache = jax.eval_shape(functools.partial(model.init_cache, 1, 1024))

    def call(variables, tokens, cache):
        out = model.apply(variables, tokens, cache=cache, logits="last")
        return out.logits, out.cache

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    logits, _ = jax.jit(call).lower(variables, tokens, cache).out_info
    assert logits.shape == (1, 1, 2112)


@pytest.mark.slow  # a gradient through seven layers, some twenty seconds of tracing
def test_small_trains():
    model, variables = abstract("small")

    def loss(params, buffers, tokens):
        out = model.apply({"params": params, "buffers": buffers}, tokens, mtp=True)
        return jnp.mean(out.logits) + sum(jnp.mean(each) for each in out.mtp_logits)

    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    params = variables["params"]
    lowered = jax.jit(jax.grad(loss)).lower(params, variables["buffers"], tokens)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), lowered.out_info)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_program_size_does_not_grow_with_depth():
    def lines(layers):
        config = v4jax.get_config("flash")
        config = type(config)(layers=config.layers[3:5] * layers, mtp_layers=())
        model = Transformer(config, dtype="bfloat16")
        tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
        lowered = jax.jit(model.apply).lower(model.abstract_variables(), tokens)
        return len(lowered.as_text().splitlines())

    assert lines(20) == lines(5)


def test_train_step_lowers():
    """Forward and backward of Flash with rematerialisation."""
    model, variables = abstract("flash", dtype="bfloat16", remat=True)
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(params, buffers, tokens):
        out = model.apply({"params": params, "buffers": buffers}, tokens, mtp=True)
        return jnp.mean(out.logits) + jnp.mean(out.mtp_logits[0])

    started = time.process_time()
    jax.jit(jax.grad(loss)).lower(variables["params"], variables["buffers"], tokens)
    assert time.process_time() - started < 60
