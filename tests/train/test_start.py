"""Where a run begins: the hash tables of its text."""

import dataclasses

import jax
import numpy as np

from tests.support.tiny import tiny_config
from v4jax.config import CSA, HCA, WINDOW, with_hash_routing
from v4jax.datasets.hash_table import hash_table
from v4jax.model.transformer import Transformer
from v4jax.train import start


def test_each_layer_has_a_hash_table_with_a_seed_of_its_own():
    """A window layer, then twice the unit (CSA, HCA), then one layer that looks nothing up."""
    hca = dataclasses.replace(HCA, ratio=16)
    layers = with_hash_routing((WINDOW, CSA, hca, CSA, hca), 5) + (WINDOW,)
    model = Transformer(tiny_config(layers=layers, mtp_layers=()), min_repeats=2)
    assert [s.name for s in model.segments()] == ["layers_0", "layers_1", "layers_5"]
    shapes = model.abstract_variables()["buffers"]
    buffers = jax.tree.map(lambda leaf: np.full(leaf.shape, -1, leaf.dtype), shapes)
    count_V = np.arange(model.config.vocab_size)[::-1]
    found = start.with_hash_tables(model, buffers, count_V, seed=7)

    def table(seed):
        experts, k = model.config.n_routed_experts, model.config.num_experts_per_tok
        return hash_table(count_V, experts, k, seed)

    def found_in(segment, block):
        return found[segment][block]["ffn"]["gate"].pop("tid2eid")

    # Trained checkpoints were routed by these: the seed, the segment's first layer, 1000 per place
    # in the unit, 1 per repeat.
    np.testing.assert_array_equal(found_in("layers_0", "block_0"), table(7))
    np.testing.assert_array_equal(found_in("layers_1", "block_0"), [table(8), table(9)])
    np.testing.assert_array_equal(found_in("layers_1", "block_1"), [table(1008), table(1009)])
    rest = jax.tree.leaves(found)
    assert rest and all(np.all(np.asarray(leaf) == -1) for leaf in rest)
