"""Lengths, documents and calls drawn at random: on a mesh as on one device."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tests.sharding import meshes
from tests.sharding.meshes import LENGTH, ROWS
from v4jax.sharding.rules import PREFILL

pytestmark = pytest.mark.slow  # minutes of compilation
LOGITS = 2e-5
# One number of tokens, since each other one is a program of its own; two meshes of slices that are
# shorter than a window.
MESHES = ("sequence=8", "data=2,fsdp=2,sequence=2")


@functools.cache
def programs(sizes):
    """(packed, cached) calls of the model on a mesh, or with "" on one device."""
    model, variables = meshes.on_mesh(sizes, PREFILL) if sizes else meshes.alone()
    aux = ("chosen", "router_experts")

    @jax.jit
    def packed(documents):
        out = model.apply(variables, meshes.tokens(), segment_ids=documents, aux=aux)
        return out.logits, out.aux

    @jax.jit
    def cached(first, second):
        cache = model.init_cache(ROWS, 160)
        tokens = meshes.tokens()
        cache = model.apply(variables, tokens, cache=cache, lengths=first, logits="none").cache
        out = model.apply(variables, tokens, cache=cache, lengths=second, aux=aux)
        return out.logits, out.aux

    return packed, cached


def compare(found, wanted, real):
    assert np.abs(np.where(real[..., None], found[0] - wanted[0], 0)).max() <= LOGITS
    for name in ("chosen", "router_experts"):
        for layer, value in found[1][name].items():
            same = np.asarray(value == wanted[1][name][layer]).all(-1)
            assert (same | ~real).all()


@pytest.mark.parametrize("sizes", MESHES)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**16), often=st.sampled_from([0.01, 0.05, 0.2, 0.7]))
def test_documents(sizes, seed, often):
    starts = np.random.default_rng(seed).random((ROWS, LENGTH)) < often
    documents = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    found, wanted = (programs(where)[0](documents) for where in (sizes, ""))
    compare(found, wanted, np.ones((ROWS, LENGTH), bool))


@pytest.mark.parametrize("sizes", MESHES)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**16))
def test_lengths(sizes, seed):
    """A prefill and a second chunk, every row of a length of its own, none among them."""
    lengths = np.random.default_rng(seed).integers(0, LENGTH + 1, (2, ROWS)).astype(np.int32)
    found, wanted = (programs(where)[1](*jnp.asarray(lengths)) for where in (sizes, ""))
    compare(found, wanted, np.arange(LENGTH)[None] < lengths[1][:, None])
