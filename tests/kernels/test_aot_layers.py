"""Whole attention layers of Flash for a TPU that is not there: their memory, their machine code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support import aot
from v4jax.model.attention import Attention
from v4jax.model.context import place_tokens
from v4jax.model.layers import Execution
from v4jax.plan import compiler

LENGTHS = (16384, 32768, 65536)


@functools.cache
def layer(kind):
    """Flash's layer of a kind, its variables and its output for them and an input [1,T,D]."""
    config = v4jax.get_config("flash")
    spec = next(layer for layer in config.layers if layer.attention == kind)
    module = Attention(config, spec, Execution("bfloat16"))

    def context(x_BTD):
        return place_tokens(jnp.zeros(x_BTD.shape[:2], jnp.int32), None, None, None)

    def init(x_BTD):
        return module.init(jax.random.key(0), x_BTD, context(x_BTD))

    def run(variables, x_BTD):
        return module.apply(variables, x_BTD, context(x_BTD))[0]

    variables = jax.eval_shape(init, states(8))
    return run, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)


def states(length):
    width = v4jax.get_config("flash").hidden_size
    return jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16)


def temporaries(length, folder):
    """Bytes of a CSA layer's forward and backward pass beside its arguments and its gradients.

    By the compiler's list of allocations. libtpu's `temp_size_in_bytes` is larger than that by what
    the heap's gaps take, once more.
    """
    run, variables = layer("csa")

    def total(variables, x_BTD):
        return jnp.sum(run(variables, x_BTD).astype(jnp.float32))

    gradients = jax.grad(total, argnums=(0, 1))
    compiled = aot.compile_tpu(
        "v5p", gradients, variables, states(length), options={"xla_dump_to": str(folder)}
    )
    assert "sparse_attention_dkv" in compiled.as_text()
    argument, whole = compiler.placed(next(folder.glob(compiler.BUFFERS)).read_text())
    return whole - argument - compiled.memory_analysis().output_size_in_bytes


@pytest.mark.slow
@aot.needs_libtpu
def test_temporaries_of_a_csa_layer_grow_with_the_sequence(tmp_path):
    found = []
    for length in LENGTHS:
        folder = tmp_path / str(length)
        folder.mkdir()
        found.append(temporaries(length, folder))
    print("temporaries", {n: f"{x / 1e9:.2f} GB" for n, x in zip(LENGTHS, found, strict=True)})
    each = np.array(found) / np.array(LENGTHS)
    assert each.max() <= 1.1 * each.min()


@pytest.mark.slow
@aot.needs_libtpu
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_a_layers_output_compiles_to_machine_code(kind):
    """At 16,384 tokens v5p's compiler died of a minimum over positions that it made up itself."""
    run, variables = layer(kind)
    compiled = aot.compile_tpu("v5p", run, variables, states(16384))
    assert "sparse_attention_forward" in compiled.as_text()
