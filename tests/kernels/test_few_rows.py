"""A decode step's experts, float32 in plain XLA: few rows, from one to where pieces serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.selection import first
from v4jax.kernels.grouped_matmul import api, cases, every_expert, row_by_row, work_items
from v4jax.sharding import expert
from v4jax.sharding.rules import ONE_DEVICE

D, F, EXPERTS, CHOICES, LIMIT = 64, 48, 8, 3, 0.3
# One token: row by row. Two, nine and 32: every expert, up to its most. 33: pieces.
QUICK, SWEEP = [1, 2, 9, 32, 33], list(range(1, 65))


def routed(x_XD, chosen_XK, gates_XK, weights, implementation=None):
    def ffn(*rows):
        return api.expert_ffn(*rows, *weights, limit=LIMIT, implementation=implementation)

    return expert.route(ONE_DEVICE, x_XD, chosen_XK, gates_XK, EXPERTS, ffn, implementation)


@jax.jit
def ours(x_XD, chosen_XK, gates_XK, weights):
    return api.of_tokens(routed, x_XD, chosen_XK, gates_XK, weights, limit=LIMIT)


def wanted(x_XD, chosen_XK, gates_XK, weights):
    """Token by token, choice by choice, in NumPy's float64."""
    y = np.zeros(x_XD.shape)
    for token, experts in enumerate(np.asarray(chosen_XK)):
        for choice, e in enumerate(experts):
            w1, w2, w3 = (np.asarray(w[e], np.float64) for w in weights)
            a = np.minimum(w1 @ x_XD[token], LIMIT)
            b = np.clip(w3 @ x_XD[token], -LIMIT, LIMIT)
            y[token] += w2 @ (float(gates_XK[token, choice]) * a / (1 + np.exp(-a)) * b)
    return y


@functools.cache
def inputs(sizes, d, f, dtype="float32"):
    """By one program."""
    return jax.jit(lambda: cases.inputs(sizes, d, f, dtype=dtype))()


def weights():
    return inputs((1,) * EXPERTS, D, F)[2]


def tokens(count, seed=0, pool=EXPERTS):
    """x, chosen and gates; experts from the first `pool` alone: the others are empty."""
    rng = np.random.default_rng(seed + 1000 * count)
    chosen = np.stack([rng.permutation(pool)[:CHOICES] for _ in range(count)])
    x, gates = rng.normal(size=(count, D)) * 0.4, rng.uniform(0.5, 1.5, (count, CHOICES))
    return jnp.asarray(x, jnp.float32), jnp.asarray(chosen), jnp.asarray(gates, jnp.float32)


def close(mine, other):
    mine, other = np.asarray(mine), np.asarray(other)
    size = max(1.0, float(np.abs(other).max()))
    np.testing.assert_allclose(mine, other, atol=1e-5 * size, rtol=1e-5)


@pytest.mark.parametrize("count", first(QUICK, SWEEP))
def test_every_count_of_tokens(count):
    """Experts chosen at random, and the same few by all tokens, most of them empty."""
    for pool in (EXPERTS, CHOICES):
        args = tokens(count, pool=pool)
        close(ours(*args, weights()), wanted(*args, weights()))


@pytest.mark.parametrize("count", first(QUICK, SWEEP))
def test_an_expert_that_a_token_names_twice(count):
    """As a hash table may: it counts with both gates."""
    x, chosen, gates = tokens(count)
    chosen = chosen.at[::2, 2].set(chosen[::2, 0])
    close(ours(x, chosen, gates, weights()), wanted(x, chosen, gates, weights()))


@pytest.mark.parametrize("count", first(QUICK, SWEEP))
def test_a_token_does_not_depend_on_the_others(count):
    """Bit for bit, in the same program, whatever the others are and choose, NaN too."""
    mine = tokens(count)
    for seed, pool in ((1, EXPERTS), (2, CHOICES)):
        others = tokens(count, seed, pool)
        at = count // 2
        mixed = jax.tree.map(lambda a, b, at=at: a.at[at].set(b[at]), others, mine)
        np.testing.assert_array_equal(ours(*mixed, weights())[at], ours(*mine, weights())[at])
    x, *rest = mine
    spoilt = x.at[0].set(jnp.nan)
    np.testing.assert_array_equal(ours(spoilt, *rest, weights())[1:], ours(*mine, weights())[1:])


@pytest.mark.parametrize("count", first([1, 9], [1, 2, 3, 9, 32, 33, 64]))
def test_gradients_are_the_references(count):
    x, chosen, gates = tokens(count)

    def gradients(function):
        def loss(x, gates, weights):
            return jnp.sum(jnp.sin(3 * function(x, chosen, gates, weights)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, gates, weights())

    theirs = gradients(functools.partial(routed, implementation="reference"))
    jax.tree.map(close, gradients(ours), theirs)


@pytest.mark.parametrize("dtype", first(["bfloat16"], ["float32", "bfloat16"]))
def test_one_token_without_a_sort_has_the_same_bits(dtype):
    """Row by row, whether the rows were sorted by expert first or not."""
    x, chosen, gates = tokens(2)
    x, stacks = x.astype(dtype), tuple(w.astype(dtype) for w in weights())
    rounding = api.Rounding(dtype)

    def sorted_rows(x, chosen, gates, stacks):
        def ffn(*rows):
            return api.expert_ffn(*rows, *stacks, limit=LIMIT, rounding=rounding)

        return expert.route(ONE_DEVICE, x, chosen, gates, EXPERTS, ffn)

    run = functools.partial(row_by_row.of_tokens, limit=LIMIT, rounding=rounding)
    mine, other = (jax.jit(f)(x, chosen, gates, stacks) for f in (run, sorted_rows))
    np.testing.assert_array_equal(mine, other)


def test_where_every_expert_pays():
    """Float32 alone, a decode batch alone, and only if most experts are chosen anyhow."""
    stacks = weights()
    assert every_expert.pays(9, CHOICES, stacks, api.Rounding())
    assert not every_expert.pays(1, CHOICES, stacks, api.Rounding())
    assert not every_expert.pays(33, CHOICES, stacks, api.Rounding())
    assert not every_expert.pays(9, CHOICES, stacks, api.Rounding("bfloat16"))
    assert not every_expert.pays(9, CHOICES, stacks, api.Rounding("bfloat16", native=True))
    many = tuple(jnp.zeros((256, *w.shape[1:])) for w in stacks)
    assert not every_expert.pays(8, CHOICES, many, api.Rounding())


@pytest.mark.parametrize("tile", [2, 16])
def test_items_are_no_more_than_a_decode_step_needs(tile):
    """12 rows of 40 groups: an item for each pair of a tile and a group, in a table that short."""
    rng, find = np.random.default_rng(tile), jax.jit(work_items.tiles, static_argnums=(1, 2))
    for most in (1, 3, 40):
        sizes = np.bincount(rng.integers(0, most, 12), minlength=40)
        work = find(jnp.asarray(sizes, jnp.int32), 12, tile)
        assert work.group_I.size == -(-12 // tile) + 12 - 1
        count = int(work.count_1[0])
        found = zip(np.asarray(work.tile_I)[:count], np.asarray(work.group_I)[:count], strict=True)
        owner = np.repeat(np.arange(40), sizes)
        assert list(found) == sorted({(row // tile, group) for row, group in enumerate(owner)})
