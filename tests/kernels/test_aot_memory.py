"""Training one CSA layer takes memory in proportion to the sequence, on a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.kernels import aot
from v4jax.model.attention import Attention
from v4jax.model.context import place_tokens
from v4jax.model.layers import Numerics

LENGTHS = (16384, 32768, 65536)


def temporaries(length):
    """Bytes of temporaries of the layer's forward and backward pass, by the compiler."""
    config = v4jax.get_config("flash")
    spec = next(layer for layer in config.layers if layer.attention == "csa")
    layer = Attention(config, spec, Numerics("bfloat16"))

    def run(variables, x_BTD):
        tokens = jnp.zeros((1, length), jnp.int32)
        context = place_tokens(tokens, None, None, None)
        out, _, _ = layer.apply(variables, x_BTD, context)
        return jnp.sum(out.astype(jnp.float32))

    def init(x_BTD):
        context = place_tokens(jnp.zeros((1, 8), jnp.int32), None, None, None)
        return layer.init(jax.random.key(0), x_BTD, context)

    small = jax.ShapeDtypeStruct((1, 8, config.hidden_size), jnp.bfloat16)
    variables = jax.eval_shape(init, small)
    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)
    x = jax.ShapeDtypeStruct((1, length, config.hidden_size), jnp.bfloat16)
    compiled = aot.compile_tpu("v5p", jax.grad(run, argnums=(0, 1)), variables, x)
    assert "sparse_attention_dkv" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@aot.needs_libtpu
def test_temporaries_of_a_csa_layer_grow_with_the_sequence():
    found = [temporaries(length) for length in LENGTHS]
    print("temporaries", {n: f"{x / 1e9:.2f} GB" for n, x in zip(LENGTHS, found, strict=True)})
    each = np.array(found) / np.array(LENGTHS)
    assert each.max() <= 1.1 * each.min()
