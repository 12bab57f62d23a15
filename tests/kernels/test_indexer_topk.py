"""The indexer's choice against a stable sort, ties and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels.indexer_topk import api, xla

CASES = {
    "few_entries": {"length": 9, "entries": 5, "topk": 3},
    "one_choice": {"length": 33, "entries": 40, "topk": 1},
    "all_of_them": {"length": 20, "entries": 12, "topk": 99},
    "several_blocks": {"length": 300, "entries": 75, "topk": 12},
    "several_tiles": {"length": 3, "entries": 2300, "topk": 100, "hidden": 9000},
    "one_query": {"length": 1, "entries": 700, "topk": 64, "hidden": 2000},
}


def make(length, entries, topk, hidden=0, heads=4, width=8, rounded=False):
    keys = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(keys[0], (2, length, heads, width))
    weight = jax.random.normal(keys[1], (2, length, heads))
    index_keys = jax.random.normal(keys[2], (2, entries, width))
    if rounded:  # a coarse grid makes exact ties common
        q, weight, index_keys = jnp.round(q), jnp.round(weight), jnp.round(index_keys)
    position = hidden + jnp.broadcast_to(jnp.arange(length)[None], (2, length))
    high = jnp.minimum((position + 1) // 4, entries)
    low = jnp.where(jnp.arange(2)[:, None] == 1, high // 3, 0)
    return (q, weight, index_keys, low, high, topk)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_same_choice_as_a_stable_sort(case, rounded):
    args = make(**CASES[case], rounded=rounded)
    chosen = jax.jit(api.indexer_topk, static_argnums=5)(*args)
    wanted = api.indexer_topk(*args, implementation="reference")
    np.testing.assert_array_equal(chosen, wanted)


def test_equal_scores_go_to_the_lower_index():
    q, weight = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1))
    keys = jnp.array([1.0, 3, 2, 3, 2, 3, -1, -5])[None, :, None]
    low, high = jnp.array([[0]]), jnp.array([[8]])
    for topk, wanted in ((2, [1, 3]), (4, [1, 2, 3, 5]), (7, [0, 1, 2, 3, 4, 5, 6])):
        for name in ("xla", "reference"):
            chosen = api.indexer_topk(q, weight, keys, low, high, topk, implementation=name)
            assert chosen[0, 0].tolist() == wanted


def test_minus_zero_ties_with_zero():
    scores = jnp.array([0.0, -0.0, 1.0, -1.0])
    order = xla.order_preserving(scores)
    assert order[0] == order[1]
    assert order[2] > order[0] > order[3] > 0


def test_nothing_visible_chooses_nothing():
    args = make(length=5, entries=40, topk=8)
    chosen = api.indexer_topk(*args[:3], args[3] * 0, args[4] * 0, 8)
    assert np.all(chosen == -1)
