"""The step: accumulation, clip, stages that leave parameters alone, biases that even the load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.tiny import VARIANTS, tiny_config
from tests.support.train_models import ragged, small_batch, small_model
from v4jax import weights
from v4jax.config import CSA
from v4jax.errors import InputError
from v4jax.model.context import document_starts
from v4jax.model.transformer import Transformer
from v4jax.train import step
from v4jax.train.loss import LossWeights
from v4jax.train.optimizer import OptimizerConfig, make_optimizer, parameter_of
from v4jax.train.step import (
    Rates,
    StepConfig,
    accumulate,
    balanced,
    new_state,
    train_step,
)
from v4jax.train.tree_paths import tree_path

RATES = Rates(jnp.float32(1e-2), jnp.float32(0.3))


def optimizer_of(model):
    declared = weights.parameters(model.config, model.min_repeats)
    return make_optimizer(OptimizerConfig(), declared)


@functools.cache
def compiled(config):
    model, _ = small_model()
    optimizer = optimizer_of(model)
    return jax.jit(functools.partial(train_step, model, optimizer, config))


@functools.cache
def begin():
    model, variables = small_model()
    optimizer = optimizer_of(model)
    return new_state(variables["params"], variables["buffers"], optimizer)


def differing(a, b, name=tree_path):
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {name(path) for (path, x), y in pairs if bool(jnp.any(x != y))}


def test_every_parameter_moves_and_the_loss_falls():
    state, batch = begin(), small_batch(rows=4)
    losses = []
    for _ in range(4):
        before = state
        state, noted = compiled(StepConfig())(state, batch, RATES)
        losses.append(float(noted["loss"]))
    position = np.arange(64) - np.asarray(document_starts(jnp.asarray(batch.segment_ids_BT)))
    counted = [noted[name] for name in ("targets", "mtp_targets", "indexer_queries")]
    targets = batch.weights_BTJ.sum((0, 1))
    np.testing.assert_array_equal(counted, [*targets, (position >= 3).sum()])
    assert losses == sorted(losses, reverse=True)
    assert len(differing(state.params, before.params)) == len(jax.tree.leaves(state.params))
    assert int(state.step) == 4


def test_accumulated_parts_are_the_whole_batch():
    """Two programs of a gradient: of one layer and an MTP block, of one stream."""
    model, variables = small_model(layers=(CSA,), hc_mult=1)
    optimizer = optimizer_of(model)
    state = new_state(variables["params"], variables["buffers"], optimizer)
    batch = ragged([(66,), (40, 20), (3,) * 22, (2,) * 33])
    (whole, noted), (parts, noted_parts) = (
        jax.jit(functools.partial(accumulate, model, StepConfig(parts=n)))(state, batch, RATES)
        for n in (1, 2)
    )
    for name in ("loss", "mtp", "balance", "indexer", "indexer_uniform"):
        np.testing.assert_allclose(noted[name], noted_parts[name], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True
    ):
        assert float(jnp.abs(a - b).max()) < 1e-4 * float(jnp.abs(a).max()), tree_path(path)


def test_the_gradient_is_clipped_to_its_global_norm(monkeypatch):
    """What the optimiser is given. Any gradient will do, so the model is not compiled for it."""

    def accumulated(model, config, state, *_):
        return state.params, {"load": {layer: jnp.ones(6) for layer in range(3)}}

    monkeypatch.setattr(step, "accumulate", accumulated)
    (model, _), given = small_model(), optax.trace(decay=0.9)
    state = new_state(begin().params, begin().buffers, given)
    clipped, whole = (
        jax.jit(functools.partial(train_step, model, given, StepConfig(clip=clip)))(
            state, small_batch(rows=4), RATES
        )
        for clip in (1e-3, None)
    )
    np.testing.assert_allclose(clipped[1]["grad_norm"], whole[1]["grad_norm"], rtol=1e-5)
    factor = 1e-3 / float(whole[1]["grad_norm"])
    for a, b in zip(
        jax.tree.leaves(clipped[0].moments), jax.tree.leaves(whole[0].moments), strict=True
    ):
        np.testing.assert_allclose(a, factor * b, rtol=1e-4, atol=1e-9)


def test_indexer_warm_up_moves_the_indexer_alone():
    config = StepConfig(trained="/indexer/", dense=True, bias_step=0.0)
    state, noted = compiled(config)(begin(), small_batch(rows=4), RATES)
    moved = differing(state.params, begin().params)
    assert moved and all("/indexer/" in path for path in moved)
    everything = {tree_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert moved == {path for path in everything if "/indexer/" in path}
    assert not differing(state.buffers, begin().buffers)
    touched = differing(state.moments, begin().moments, parameter_of)
    assert all("/indexer/" in path or "/" not in path for path in touched)
    assert noted["indexer"] > 0


@pytest.mark.slow  # of its gradient, tests/train/test_loss.py says the same
def test_weight_zero_leaves_the_indexer_where_it_is():
    config = StepConfig(losses=LossWeights(indexer=0.0), trained=r"^(?!.*/indexer/)")
    state, noted = compiled(config)(begin(), small_batch(rows=4), RATES)
    assert not any("/indexer/" in path for path in differing(state.params, begin().params))
    assert "indexer" not in noted


def test_biases_move_towards_an_even_load():
    model = Transformer(tiny_config(**VARIANTS["scanned"]), min_repeats=2)
    buffers = jax.tree.map(lambda x: jnp.zeros(x.shape), model.abstract_variables()["buffers"])
    load = {layer: jnp.arange(6.0) + layer for layer in range(1, 5)} | {5: jnp.array([9.0] * 6)}
    moved = balanced(model, buffers, load, 1e-3)
    up_down = 1e-3 * jnp.array([1, 1, 1, -1, -1, -1.0])
    for place in (0, 1):
        bias = moved["layers_1"][f"block_{place}"]["ffn"]["gate"]["bias"]
        np.testing.assert_allclose(bias, jnp.stack([up_down, up_down]))
    assert bool(jnp.all(moved["mtp_0"]["block"]["ffn"]["gate"]["bias"] == 0))


def test_parts_that_do_not_divide_the_batch():
    with pytest.raises(InputError, match="batch of 4 rows cannot be accumulated in 3 equal parts"):
        compiled(StepConfig(parts=3))(begin(), small_batch(rows=4), RATES)
