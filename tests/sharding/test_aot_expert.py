"""The exchange of tokens compiled for accelerators that are not there."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.support import aot, routing
from tests.support.selection import first
from v4jax.plan import hlo, topology

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOICES = 512, 256, 128, 16, 3


def compiled(name, strategy, waves=1, capacity=None, backward=True, **sizes):
    """Kinds and counts of the collectives of forward and backward pass, in bfloat16."""
    layout = routing.layout_on(strategy, topology.parse(name).devices, waves, capacity, **sizes)
    tokens = PartitionSpec(layout.axes("batch") + layout.axes("sequence"))
    stack = layout.spec("expert")

    def spec(shape, dtype, partition):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, partition))

    args = [
        spec((TOKENS, WIDTH), jnp.bfloat16, tokens),
        spec((TOKENS, CHOICES), jnp.float32, tokens),
        spec((TOKENS, CHOICES), jnp.int32, tokens),
        spec((EXPERTS, HIDDEN, WIDTH), jnp.bfloat16, stack),
        spec((EXPERTS, WIDTH, HIDDEN), jnp.bfloat16, stack),
        spec((EXPERTS, HIDDEN, WIDTH), jnp.bfloat16, stack),
    ]

    def loss(*args):
        return jnp.square(routing.routed(layout, EXPERTS)(*args)).sum()

    run = jax.grad(loss, argnums=(0, 1, 3, 4, 5)) if backward else loss
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        text = jax.jit(run).lower(*args).compile().as_text()
    found, _ = hlo.collectives(text, dict(layout.mesh.shape))
    return collections.Counter(each.kind for each in found)


@aot.needs_libtpu
@pytest.mark.parametrize("waves, capacity", first([(1, None)], [(1, None), (2, 2.0)]))
def test_tpu(waves, capacity):
    found = compiled("v5p:2x2x1", "train", waves, capacity, expert=4)
    assert found["ragged-all-to-all"] == 6 * waves
    assert not found["all-to-all"]


@aot.needs_cuda
@pytest.mark.parametrize("waves, capacity", first([(1, None)], [(1, None), (2, 2.0)]))
def test_h100(waves, capacity):
    found = compiled("h100:1x8", "prefill", waves, capacity, fsdp=2, expert=4)
    assert found["ragged-all-to-all"] == 6 * waves
    assert not found["all-to-all"]


@aot.needs_libtpu
def test_tpu_gathers_a_decode_step():
    found = compiled("v5p:2x2x1", "decode", backward=False, fsdp=2, expert=2)
    assert not found["ragged-all-to-all"] and not found["all-to-all"]
