"""Sparse attention: every implementation against full masks and one softmax, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels.sparse_attention import api, reference, xla

CASES = {
    "window_only": {"length": 37, "window": 9, "entries": 0},
    "window_with_older_rows": {"length": 5, "window": 9, "entries": 0, "older": 8},
    "few_older_rows": {"length": 150, "window": 64, "entries": 0, "older": 3},
    "every_entry": {"length": 300, "window": 24, "entries": 75, "ratio": 4},
    "several_tiles": {"length": 270, "window": 8, "entries": 1100, "ratio": 1, "hidden": 830},
    "one_entry": {"length": 6, "window": 3, "entries": 1, "ratio": 4},
    "chosen_masked": {"length": 140, "window": 16, "entries": 35, "ratio": 4, "choices": 10},
    "chosen_gathered": {"length": 260, "window": 16, "entries": 65, "ratio": 4, "choices": 6},
    "one_query": {"length": 1, "window": 16, "entries": 90, "ratio": 4, "choices": 7, "older": 15},
    "no_window": {"length": 140, "window": 0, "entries": 140, "ratio": 1},
}


def make(length, window, entries, ratio=4, older=0, hidden=0, choices=0, seed=0):
    """Random inputs; `hidden` tokens stand before the first query."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    batch, heads, width = 2, 3, 16

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    position = hidden + jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    diff = {"q_BTNH": normal(batch, length, heads, width), "sink_N": normal(heads)}
    other = {"scale": width**-0.5, "window": window}
    if window:
        diff["window_BSH"] = normal(batch, older + length, width)
        first = jnp.array([[0], [min(older, 2)]])
        other["first_BT"] = jnp.broadcast_to(first, (batch, length))
    if entries:
        diff["entries_BCH"] = normal(batch, entries, width)
        high = jnp.minimum((position + 1) // ratio, entries)
        low = jnp.where(jnp.arange(batch)[:, None] == 1, jnp.minimum(high, 2), 0)
        other |= {"low_BT": low, "high_BT": high}
        if choices:
            other["chosen_BTK"] = choose(next(keys), low, high, entries, choices)
    return diff, other


def choose(key, low, high, entries, choices):
    """Random distinct visible entries in ascending order, -1 where there are fewer."""
    order = jax.random.uniform(key, (*low.shape, entries))
    entry = jnp.arange(entries)[None, None]
    visible = (entry >= low[..., None]) & (entry < high[..., None])
    picked = jnp.argsort(jnp.where(visible, order, 2.0), axis=-1)[..., :choices]
    count = (high - low)[..., None]
    picked = jnp.where(jnp.arange(choices)[None, None] < count, picked, entries)
    picked = jnp.sort(picked, axis=-1)
    return jnp.where(picked == entries, -1, picked).astype(jnp.int32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla"])
def test_forward_and_gradients(case, implementation):
    diff, other = make(**CASES[case])
    weight = jax.random.normal(jax.random.key(9), diff["q_BTNH"].shape)

    def run(name):
        def loss(diff):
            out = api.sparse_attention(**diff, **other, implementation=name)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(diff)

    (_, out), grads = run(implementation)
    (_, wanted), wanted_grads = run("reference")
    np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        size = np.abs(wanted_grads[name]).max()
        np.testing.assert_allclose(grad, wanted_grads[name], atol=1e-5 * max(size, 1), rtol=1e-5)


def test_masks_by_eye():
    """Window 2 with one older row; row 1 of the batch may not see it."""
    first = jnp.array([[0, 0, 0], [1, 1, 1]])
    mask = reference.window_mask(first, 4, 2).astype(int)
    assert mask[0].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask[1].tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    low, high = jnp.array([[0, 1, 1]]), jnp.array([[0, 2, 3]])
    visible = reference.entry_mask(3, low, high, None).astype(int)
    assert visible[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    chosen = jnp.array([[[-1, -1], [1, -1], [2, -1]]])
    picked = reference.entry_mask(3, low, high, chosen).astype(int)
    assert picked[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_query_that_sees_nothing_attends_to_the_sink():
    q, sink = jnp.ones((1, 1, 2, 4)), jnp.zeros(2)
    places = {"low_BT": jnp.array([[3]]), "high_BT": jnp.array([[3]])}
    out = api.sparse_attention(q, sink, scale=1.0, entries_BCH=jnp.ones((1, 5, 4)), **places)
    assert np.all(out == 0)


def test_both_ways_to_meet_the_chosen_entries_are_tested():
    for case, gathers in (("chosen_masked", False), ("chosen_gathered", True)):
        diff, other = make(**CASES[case])
        assert xla._gathers(diff["entries_BCH"], other["chosen_BTK"]) == gathers


def test_unknown_implementation_is_named():
    with pytest.raises(NotImplementedError, match="no implementation 'cuda'"):
        api.sparse_attention(jnp.ones((1, 1, 1, 2)), jnp.ones(1), scale=1.0, implementation="cuda")
