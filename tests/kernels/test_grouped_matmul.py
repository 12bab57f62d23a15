"""Grouped experts against every expert on every row, with gradients and stored weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax import quant
from v4jax.kernels.grouped_matmul import api
from v4jax.kernels.quantized_matmul import api as quantized_matmul

GROUPS = {
    "even": [5, 5, 5, 5],
    "empty_groups": [0, 17, 0, 0, 40, 0],
    "one_has_all": [0, 0, 700, 0],
    "single_rows": [1, 0, 1, 1],
    "skewed": [1, 600, 3, 33, 97],
}


def make(sizes, d=32, f=64):
    keys = iter(jax.random.split(jax.random.key(len(sizes)), 6))
    rows, experts = sum(sizes), len(sizes)

    def normal(*shape):
        return jax.random.normal(next(keys), shape) * 0.4

    weights = (normal(experts, f, d), normal(experts, d, f), normal(experts, f, d))
    return normal(rows, d), 1 + normal(rows), weights, jnp.asarray(sizes, jnp.int32)


def run(args, implementation, limit=0.3):
    x, gate, weights, sizes = args

    def loss(x, gate, weights):
        y = api.expert_ffn(x, gate, sizes, *weights, limit=limit, implementation=implementation)
        return jnp.sum(jnp.sin(3 * y)), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gate, weights)


@pytest.mark.parametrize("groups", GROUPS)
def test_forward_and_gradients(groups):
    args = make(GROUPS[groups])
    (_, out), grads = run(args, "xla")
    (_, wanted), wanted_grads = run(args, "reference")
    np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)
    for grad, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        size = max(float(jnp.abs(expected).max()), 1)
        np.testing.assert_allclose(grad, expected, atol=1e-5 * size, rtol=1e-4)


def test_gradient_is_zero_where_the_clamp_bites():
    x = jnp.full((1, 32), 5.0)
    w = jnp.ones((1, 32, 32))
    grad = jax.grad(
        lambda x: api.expert_ffn(x, jnp.ones(1), jnp.array([1]), w, w, w, limit=1.0).sum()
    )(x)
    assert np.all(grad == 0)


@pytest.mark.parametrize("groups", ["even", "skewed", "single_rows"])
@pytest.mark.parametrize("quantize", [quant.quantize_fp4, quant.quantize_fp8])
def test_stored_weights_equal_their_expansion(groups, quantize):
    x, gate, weights, sizes = make(GROUPS[groups])
    stored = [jax.vmap(quantize)(w) for w in weights]
    expanded = [w.dequantize(jnp.float32) for w in stored]
    ours = api.expert_ffn(x, gate, sizes, *stored, limit=10.0)
    wanted = api.expert_ffn(x, gate, sizes, *expanded, limit=10.0, implementation="reference")
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)
    grad = jax.grad(lambda x: api.expert_ffn(x, gate, sizes, *stored, limit=10.0).sum())(x)
    wanted = jax.grad(
        lambda x: api.expert_ffn(
            x, gate, sizes, *expanded, limit=10.0, implementation="reference"
        ).sum()
    )(x)
    np.testing.assert_allclose(grad, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(256, 128), (384, 256), (200, 96), (512, 64)])
def test_stored_matrix_in_blocks(shape, monkeypatch):
    monkeypatch.setattr(quantized_matmul, "BLOCK_ELEMENTS", 128 * 128)
    w = quant.quantize_fp8(jax.random.normal(jax.random.key(0), shape))
    x = jax.random.normal(jax.random.key(1), (2, 3, shape[1]))
    ours = quantized_matmul.einsum("btd,fd->btf", x, w)
    np.testing.assert_allclose(ours, x @ w.dequantize(jnp.float32).T, atol=1e-4, rtol=1e-5)


def test_stored_groups():
    w = quant.quantize_fp8(jax.random.normal(jax.random.key(0), (256, 64)))
    grouped = jax.tree.map(lambda leaf: leaf.reshape(2, -1, leaf.shape[-1]), w)
    x = jax.random.normal(jax.random.key(1), (2, 3, 2, 64))
    ours = quantized_matmul.einsum("btgx,gox->btgo", x, grouped)
    wanted = jnp.einsum("btgx,gox->btgo", x, w.dequantize(jnp.float32).reshape(2, 128, 64))
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-5)
