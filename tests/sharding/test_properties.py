"""Meshes, lengths and documents drawn at random: on a mesh as on one device."""

import collections
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tests.support import meshes
from tests.support.compiling import OPTIMIZED
from tests.support.meshes import LENGTH, ROWS
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


AUX = ("chosen", "router_experts")


@functools.cache
def programs(sizes):
    """(packed, cached) calls of the model on a mesh, or with "" on one device; and its variables.

    Each gives the last call's logits and the choices of all its calls, which can be given to it.
    """
    model, variables = meshes.on_mesh(sizes, PREFILL) if sizes else meshes.alone()

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def packed(variables, documents, given=(None,)):
        tokens = meshes.tokens()
        out = model.apply(variables, tokens, segment_ids=documents, aux=AUX, replay=given[0])
        return out.logits, [out.aux]

    @functools.partial(jax.jit, compiler_options=OPTIMIZED)
    def cached(variables, first, second, given=(None, None)):
        run = functools.partial(model.apply, variables, meshes.tokens(), aux=AUX)
        cache = model.init_cache(ROWS, 160)
        one = run(cache=cache, lengths=first, logits="none", replay=given[0])
        two = run(cache=one.cache, lengths=second, replay=given[1])
        return two.logits, [one.aux, two.aux]

    return {"packed": packed, "cached": cached}, variables


def compare(call, sizes, arguments, real):
    """The mesh's logits and choices are one device's.

    But for a choice, in one row at most, that one rounding of the weights changes on one device as
    well: then the logits are those of one device that is given the mesh's choices.

    Args:
      arguments: of the call. real: of each of its calls of the model, which tokens count [B,T].
    """
    (run_there, variables_there), (run_here, variables) = (programs(where) for where in (sizes, ""))
    found = run_there[call](variables_there, *arguments)
    wanted = run_here[call](variables, *arguments)
    flips = first_flips(found, wanted, real)
    assert len(flips) <= 1, f"other choices, as (call, position, layer) of each row: {flips}"
    if flips:
        params = (meshes.nudged(variables["params"], seed) for seed in range(meshes.NUDGES))
        moved = (run_here[call](variables | {"params": p}, *arguments) for p in params)
        assert flips.items() <= set().union(
            *(first_flips(one, wanted, real).items() for one in moved)
        ), f"not within a rounding of the weights: {flips}"
        wanted = run_here[call](variables, *arguments, jax.device_get(found[1]))
    difference = float(np.abs(np.where(real[-1][..., None], found[0] - wanted[0], 0)).max())
    assert difference <= LOGITS


def first_flips(found, wanted, real):
    """The first other choice of each row that has one: its (call, position, layer)."""
    flips = {}
    for number, (here, there, counts) in enumerate(zip(found[1], wanted[1], real, strict=True)):
        for name in AUX:
            for layer, value in here[name].items():
                other = (np.asarray(value) != np.asarray(there[name][layer])).any(-1) & counts
                for row, position in np.argwhere(other).tolist():
                    at = (number, position, layer)
                    flips[row] = min(flips.get(row, at), at)
    return flips


@DRAWN
@given(sizes=MESHES, seed=st.integers(0, 2**16), often=st.sampled_from([0.01, 0.05, 0.2, 0.7]))
def test_documents(sizes, seed, often):
    starts = np.random.default_rng(seed).random((ROWS, LENGTH)) < often
    documents = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    compare("packed", sizes, (documents,), [np.ones((ROWS, LENGTH), bool)])


@DRAWN
@given(sizes=MESHES, seed=st.integers(0, 2**16))
def test_lengths(sizes, seed):
    """A prefill and a second chunk, every row of a length of its own, none among them."""
    lengths = np.random.default_rng(seed).integers(0, LENGTH + 1, (2, ROWS)).astype(np.int32)
    real = list(np.arange(LENGTH)[None] < lengths[:, :, None])
    compare("cached", sizes, tuple(jnp.asarray(lengths)), real)
