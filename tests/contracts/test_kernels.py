"""The model with Pallas kernels computes what it computes without: interpreted, tiny, float32."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.selection import first
from tests.support.tiny import drawn, tiny_config
from v4jax.config import CSA, WINDOW, LayerSpec, with_hash_routing
from v4jax.model.transformer import Transformer

KERNELS = ("pallas_tpu", "pallas_gpu")
TOLERANCE = 1e-4
CHUNKS = (39, 39, 1, 1)
LENGTH = sum(CHUNKS)


FEW = {"hc_mult": 2, "hc_sinkhorn_iters": 3}
# Interpreted kernels compile for long. Quick is every kernel once: forward on a layer of each kind
# of entries, gradients on one layer. Slow are an MTP block and the model that other tests have.
SIZES = {
    "layers": {
        "layers": with_hash_routing((CSA, LayerSpec("hca", ratio=16)), 1),
        "mtp_layers": (),
        **FEW,
    },
    "layer": {"layers": with_hash_routing((CSA,), 1), "mtp_layers": (), **FEW},
    "mtp": {"layers": with_hash_routing((CSA,), 1), "mtp_layers": (WINDOW,), **FEW},
    "whole": {},
}


@functools.cache
def model_and_variables(size, kernels):
    """The same variables for every choice of kernels; layers are not scanned."""
    model = Transformer(tiny_config(**SIZES[size]), min_repeats=2, kernels=kernels)
    return model, drawn(model)


def tokens():
    return jax.random.randint(jax.random.key(3), (2, LENGTH), 0, 331)


@functools.cache
def prefilled(size, kernels):
    model, variables = model_and_variables(size, kernels)
    out = jax.jit(lambda v, t: model.apply(v, t, aux=("chosen",)))(variables, tokens())
    return np.asarray(out.logits), jax.tree.map(np.asarray, out.aux["chosen"])


@functools.cache
def chunked(size, kernels):
    """Logits and choices of every chunk and decode step through a cache."""
    model, variables = model_and_variables(size, kernels)
    run = jax.jit(lambda v, t, c: model.apply(v, t, cache=c, aux=("chosen",)))
    cache, at, found = model.init_cache(2, LENGTH), 0, []
    for count in CHUNKS:
        out = run(variables, tokens()[:, at : at + count], cache)
        cache, at = out.cache, at + count
        found.append((np.asarray(out.logits), jax.tree.map(np.asarray, out.aux["chosen"])))
    return found


@functools.cache
def gradients(size, kernels):
    model, variables = model_and_variables(size, kernels)

    def loss(params):
        out = model.apply({**variables, "params": params}, tokens(), mtp=True)
        weight = jnp.cos(jnp.arange(out.logits.size, dtype=jnp.float32)).reshape(out.logits.shape)
        further = sum(jnp.mean(logits**2) for logits in out.mtp_logits)
        return jnp.mean(out.logits * weight) + further

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(variables["params"]))


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * np.std(wanted), rtol=TOLERANCE)


# The GPU's forward kernels are in its gradients too, and its decode steps in tests/kernels.
EVERY = list(itertools.product(SIZES, KERNELS))
forward = pytest.mark.parametrize("size, kernels", first([("layers", "pallas_tpu")], EVERY))


@forward
def test_prefill(size, kernels):
    logits, chosen = prefilled(size, kernels)
    wanted, wanted_chosen = prefilled(size, "xla")
    close(logits, wanted)
    jax.tree.map(np.testing.assert_array_equal, chosen, wanted_chosen)


@forward
def test_chunks_and_decode(size, kernels):
    for got, wanted in zip(chunked(size, kernels), chunked(size, "xla"), strict=True):
        close(got[0], wanted[0])
        jax.tree.map(np.testing.assert_array_equal, got[1], wanted[1])


TRAINED = [(size, kernels) for size, kernels in EVERY if size != "layers"]


# Forward by one kind of kernel and gradients by the other: quick tests see both in a whole model.
@pytest.mark.parametrize("size, kernels", first([("layer", "pallas_gpu")], TRAINED))
def test_training_gradients(size, kernels):
    got, wanted = gradients(size, kernels), gradients(size, "xla")
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))

    def check(path, a, b):
        where = jax.tree_util.keystr(path)
        # A leaf far below the largest is what a cancellation left: in float32, weights moved by
        # 1e-7 of themselves move such a one by more than 1e-4 of it (mHC's scales, measured).
        scale = max(np.abs(b).max(), 1e-2 * largest)
        np.testing.assert_allclose(a, b, atol=TOLERANCE * scale, rtol=0, err_msg=where)

    jax.tree_util.tree_map_with_path(check, got, wanted)
