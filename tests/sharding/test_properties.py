"""Meshes, lengths and documents drawn at random: on a mesh as on one device."""

import collections
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tests.compiling import OPTIMIZED
from tests.sharding import meshes
from tests.sharding.meshes import LENGTH, ROWS
from v4jax.sharding import mesh
from v4jax.sharding.rules import PREFILL

pytestmark = pytest.mark.slow  # minutes of compilation
LOGITS = 2e-5
# One number of tokens, since each other one is a program of its own; as is each mesh, hence few.
DRAWN = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def sizes_of(axes):
    """Each factor 2 of eight devices on an axis: (expert, tensor, expert) is expert=4,tensor=2."""
    counts = collections.Counter(axes)
    return ",".join(f"{axis}={2**n}" for axis, n in sorted(counts.items()))


# Two groups of the output projection: tensor can be 2 at most.
MESHES = (
    st.lists(st.sampled_from(mesh.AXES), min_size=3, max_size=3)
    .filter(lambda axes: axes.count("tensor") <= 1)
    .map(sizes_of)
)


@functools.cache
def programs(sizes):
    """(packed, cached) calls of the model on a mesh, or with "" on one device."""
    model, variables = meshes.on_mesh(sizes, PREFILL) if sizes else meshes.alone()
    aux = ("chosen", "router_experts")

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def packed(documents):
        out = model.apply(variables, meshes.tokens(), segment_ids=documents, aux=aux)
        return out.logits, out.aux

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def cached(first, second):
        cache = model.init_cache(ROWS, 160)
        tokens = meshes.tokens()
        cache = model.apply(variables, tokens, cache=cache, lengths=first, logits="none").cache
        out = model.apply(variables, tokens, cache=cache, lengths=second, aux=aux)
        return out.logits, out.aux

    return packed, cached


def compare(found, wanted, real):
    difference = float(np.abs(np.where(real[..., None], found[0] - wanted[0], 0)).max())
    assert difference <= LOGITS
    for name in ("chosen", "router_experts"):
        for layer, value in found[1][name].items():
            same = np.asarray(value == wanted[1][name][layer]).all(-1)
            assert (same | ~real).all()


@DRAWN
@given(sizes=MESHES, seed=st.integers(0, 2**16), often=st.sampled_from([0.01, 0.05, 0.2, 0.7]))
def test_documents(sizes, seed, often):
    starts = np.random.default_rng(seed).random((ROWS, LENGTH)) < often
    documents = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    found, wanted = (programs(where)[0](documents) for where in (sizes, ""))
    compare(found, wanted, np.ones((ROWS, LENGTH), bool))


@DRAWN
@given(sizes=MESHES, seed=st.integers(0, 2**16))
def test_lengths(sizes, seed):
    """A prefill and a second chunk, every row of a length of its own, none among them."""
    lengths = np.random.default_rng(seed).integers(0, LENGTH + 1, (2, ROWS)).astype(np.int32)
    found, wanted = (programs(where)[1](*jnp.asarray(lengths)) for where in (sizes, ""))
    compare(found, wanted, np.arange(LENGTH)[None] < lengths[1][:, None])
