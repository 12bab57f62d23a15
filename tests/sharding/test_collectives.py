"""Compiled programs hold the collectives that they should, and no others."""

import collections

import jax
import jax.numpy as jnp
import pytest

from tests.support import meshes
from v4jax.plan import hlo
from v4jax.sharding.rules import DECODE, DECODE_LONG, PREFILL, TRAIN

MESH = "expert=2,sequence=4"
LAYERS, CSA_LAYERS, HCA_LAYERS = 5, 2, 2
EXPERT, EVERYWHERE = ("expert",), ("expert", "sequence")


def counted(function, mesh, *args):
    """How often a run of the program does each (kind, mesh axes)."""
    text = jax.jit(function).lower(*args).compile().as_text()
    found, loops = hlo.collectives(text, mesh.shape)
    assert not loops
    count = collections.Counter()
    for one in found:
        count[one.kind, one.axes] += one.count
    return count


def served(strategy, tokens):
    """A call with a cache, its last logits wanted."""
    model, variables = meshes.on_mesh(MESH, strategy)
    cache = model.init_cache(meshes.ROWS, 160)

    def call(variables, cache, tokens_BT):
        return model.apply(variables, tokens_BT, cache=cache, logits="last")

    arguments = variables, cache, jnp.zeros((meshes.ROWS, tokens), jnp.int32)
    return counted(call, model.sharding.mesh, *arguments)


def test_a_decode_step_with_caches_in_parts():
    """Sums over experts; the best entries of all shards; partial softmaxes. No weight, no cache."""
    assert served(DECODE_LONG, 1) == {
        ("all-reduce", EXPERT): LAYERS,
        ("all-gather", EVERYWHERE): 2 * CSA_LAYERS,  # candidates and their scores
        ("all-reduce", EVERYWHERE): 2 * (CSA_LAYERS + HCA_LAYERS),  # largest; sums in one
    }


def test_a_decode_step_of_many_rows():
    """Tokens, their choices and weights to all experts, and sums of what those made."""
    assert served(DECODE, 1) == {
        ("all-gather", EXPERT): 3 * LAYERS,
        ("reduce-scatter", EXPERT): LAYERS,
    }


def test_prefill():
    count = served(PREFILL, 64)  # slices of 8 tokens
    window_hops = 2 * LAYERS  # 11 rows before its first
    csa_hops = 2 * 1 * CSA_LAYERS  # 7 raw rows, of the main compressor and of the indexer's
    hca_hops = 2 * HCA_LAYERS  # 15 raw rows
    assert count.pop(("collective-permute", ("sequence",)), 0) + count.pop(
        ("collective-permute", EVERYWHERE), 0
    ) == (window_hops + csa_hops + hca_hops)
    assert count.pop(("all-to-all", EXPERT)) == 3 * LAYERS  # rows, their weights, and back
    assert count.pop(("all-gather", EXPERT)) == LAYERS  # how many rows go where
    compressors = 2 * CSA_LAYERS + HCA_LAYERS
    assert count.pop(("all-gather", EVERYWHERE)) == 2 * compressors  # new entries, all entries
    # What is left: the last rows for the cache and for the logits, summed.
    assert {kind for kind, _ in count} == {"all-reduce"}


def test_training_gathers_each_weight_where_it_is_used():
    model, variables = meshes.on_mesh("fsdp=4,tensor=2", TRAIN)

    def call(variables, tokens_BT):
        return model.apply(variables, tokens_BT, logits="none").streams

    tokens = jnp.zeros((meshes.ROWS, 64), jnp.int32)
    count = counted(call, model.sharding.mesh, variables, tokens)
    cut = [
        axes
        for name, axes in jax.tree.leaves_with_path(
            model.logical_axes()["params"], is_leaf=lambda x: isinstance(x, jax.P)
        )
        if any(model.sharding.gathered(axis) for axis in axes)
        and not {"head", "hc_head", "mtp_0"} & {key.key for key in name}
    ]
    # A scanned weight has a leaf and is gathered in each of its two repeats.
    scanned = sum("layers" in axes for axes in cut)
    assert count[("all-gather", ("fsdp",))] == len(cut) + scanned
    sums = 2 * LAYERS + 1  # attention and experts of each layer, and the embedding's rows
    assert count[("all-reduce", ("tensor",))] == sums
    assert set(count) == {("all-gather", ("fsdp",)), ("all-reduce", ("tensor",))}


@pytest.mark.parametrize("strategy", [PREFILL, DECODE, DECODE_LONG])
def test_serving_keeps_every_weight_in_its_parts(strategy):
    assert strategy.gathered == ()
