"""What is trained with rounding and exported is what native numerics computes; gradients pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support.tiny import drawn, tiny_config
from tests.support.train_models import small_batch
from v4jax import quant
from v4jax.checkpoints import load as checkpoint
from v4jax.config import CSA, HCA, WINDOW, with_hash_routing
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.named_configs import get_config
from v4jax.train import quantized
from v4jax.train.loss import LossWeights, count, loss

pytestmark = pytest.mark.slow  # compiles whole training programs, minutes of it

# Widths in 32s, so that experts can be stored in FP4.
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "hc_sinkhorn_iters": 3}
# An HCA block closes several times in a short row, so that every weight has a gradient.
SIZES["layers"] = with_hash_routing((WINDOW, CSA, dataclasses.replace(HCA, ratio=16)), 1)


@pytest.fixture(scope="module")
def setting():
    """A model of native numerics with float32 masters."""
    config = dataclasses.replace(
        tiny_config(**SIZES, dtype="bfloat16"),
        quantization=get_config("flash").quantization,
        expert_dtype="fp4",
    )
    model = Transformer(config, numerics="native")
    return model, drawn(model)


def test_trained_is_what_the_export_computes(setting, tmp_path):
    model, variables = setting
    role_of = quantized.roles(model)
    tokens = np.random.default_rng(0).integers(0, 331, (1, 70)).astype(np.int32)

    @jax.jit
    def trained(variables):
        params = quantized.straight_through(variables["params"], role_of)
        return model.apply(variables | {"params": params}, tokens, mtp=True)

    kept = quantized.stored(variables["params"], role_of)
    checkpoint.save_official(tmp_path / "out", model.config, variables | {"params": kept})
    theirs, loaded = v4jax.load(tmp_path / "out", numerics="native")
    wanted, found = (
        jax.jit(functools.partial(theirs.apply, mtp=True))(loaded, tokens),
        trained(variables),
    )
    np.testing.assert_array_equal(found.logits, wanted.logits)
    np.testing.assert_array_equal(found.mtp_logits[0], wanted.mtp_logits[0])
    unrounded = jax.jit(model.apply)(variables, tokens).logits
    assert float(jnp.abs(unrounded - found.logits).max()) > 1e-3  # the weights' rounding shows


def test_gradients_are_those_at_the_rounded_weights(setting):
    model, variables = setting
    role_of = quantized.roles(model)
    batch = small_batch(rows=1)
    weights = LossWeights(indexer=1.0)

    @jax.jit
    @functools.partial(jax.grad, argnums=0)
    def gradient(params):
        v = variables | {"params": params}
        return loss(model, v, batch, weights, count(batch, model.config))[0]

    @jax.jit
    @functools.partial(jax.grad, argnums=0)
    def through(params):
        v = variables | {"params": quantized.straight_through(params, role_of)}
        return loss(model, v, batch, weights, count(batch, model.config))[0]

    at = jax.jit(functools.partial(quantized.straight_through, role_of=role_of))(
        variables["params"]
    )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(through(variables["params"])),
        jax.tree.leaves(gradient(at)),
        strict=True,
    )
    for (path, found), wanted in pairs:
        assert bool(jnp.any(found != 0)) and bool(jnp.all(jnp.isfinite(found))), path
        # Two programs of bfloat16 activations: the compiler fuses, and rounds, each its own way.
        scale = float(jnp.abs(wanted).max())
        assert float(jnp.abs(found - wanted).max()) < 0.02 * scale, jax.tree_util.keystr(path)


def test_expert_values_survive_the_way_through_fp8():
    """FP4 -> FP8 (128 x 128), as the report computes, changes nothing that 2^-6 scales can hold."""
    w = jax.random.normal(jax.random.key(0), (3, 128, 256)) * 0.02
    experts = quant.quantize_fp4(w).dequantize()
    np.testing.assert_array_equal(quant.quantize_fp8(experts).dequantize(), experts)


def test_a_config_that_stores_floats_is_refused():
    with pytest.raises(InputError, match="needs a config that is stored quantised"):
        quantized.roles(Transformer(tiny_config()))
