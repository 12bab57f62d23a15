"""Packed rows through whole models with Pallas kernels, interpreted: gradients of a row's entries.

Between tiles of queries that see an entry lie tiles of those that see none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.selection import first
from tests.support.tiny import drawn, tiny_config
from v4jax.config import LayerSpec
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import make_mesh, parse_sizes
from v4jax.sharding.rules import ONE_DEVICE, TRAIN, Layout

ROWS, LENGTH = 2, 120
DOCUMENTS = ((40, 40, 40), (3, 60, 7, 20, 30))
TOLERANCE = 1e-4  # as of the other contracts of whole models


@functools.cache
def model_on(sizes, kernels):
    """Two HCA layers, an entry for every 32 tokens; `sizes` of a mesh, or "" for one device."""
    config = tiny_config(
        layers=(LayerSpec("hca", ratio=32),) * 2,
        mtp_layers=(),
        hc_mult=2,
        hc_sinkhorn_iters=2,
    )
    layout = ONE_DEVICE
    if sizes:
        layout = Layout(make_mesh(jax.devices()[:4], **parse_sizes(sizes)), TRAIN)
    return Transformer(config, kernels=kernels, min_repeats=3, sharding=layout)


@functools.cache
def gradients(sizes, kernels):
    model = model_on(sizes, kernels)
    variables = drawn(model_on("", "reference"))
    if sizes:
        variables = jax.device_put(variables, sharded.variable_shardings(model))
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 331)
    documents = jnp.asarray(np.stack([np.repeat(np.arange(len(n)), n) for n in DOCUMENTS]))

    def loss(params):
        out = model.apply(variables | {"params": params}, tokens, segment_ids=documents)
        weight = jnp.cos(jnp.arange(out.logits.size, dtype=jnp.float32)).reshape(out.logits.shape)
        return jnp.mean(out.logits * weight)

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(variables["params"]))


def errors(sizes, kernels):
    """The largest difference of every gradient, in parts of its largest value."""
    wanted = gradients("", "reference")
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))

    def error(path, a, b):
        # Far below the largest one is left what cancelled (see test_kernels).
        return np.abs(a - b).max() / max(np.abs(b).max(), 1e-2 * largest)

    found = jax.tree_util.tree_map_with_path(error, gradients(sizes, kernels), wanted)
    return {jax.tree_util.keystr(p): e for p, e in jax.tree_util.tree_leaves_with_path(found)}


CALLS = [
    *(("", kernels) for kernels in ("pallas_tpu", "pallas_gpu", "xla")),
    *((sizes, "pallas_tpu") for sizes in ("sequence=4", "data=2,sequence=2")),
    ("sequence=4", "pallas_gpu"),
]


@pytest.mark.parametrize(("sizes", "kernels"), first([("", "pallas_tpu")], CALLS))
def test_gradients_of_a_whole_model(sizes, kernels):
    found = errors(sizes, kernels)
    assert any("compressor" in name and "wkv" in name for name in found)
    beyond = {name: error for name, error in found.items() if error > TOLERANCE}
    assert not beyond
