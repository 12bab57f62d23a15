"""Entries and index keys as a cache keeps them, at any width."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tests.support import meshes
from v4jax import quant
from v4jax.kernels.indexer_topk import api as indexer
from v4jax.kernels.indexer_topk import compact_keys, stored_keys
from v4jax.kernels.indexer_topk import forms as key_forms
from v4jax.kernels.sparse_attention import api, compact, entries, stored

DRAWN = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def native_rows(shape, rope, seed=0):
    """Rows of very different sizes as native numerics rounds them, bf16, zeros of both signs."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal(shape) * np.exp(5 * rng.standard_normal((*shape[:-1], 1)))
    rows = jnp.asarray(np.where(rng.random(shape) < 0.1, -0.0, rows), jnp.bfloat16)
    kept = shape[-1] - rope
    rounded = quant.fake_quant_e4m3(rows[..., :kept], stored.GROUP)
    return jnp.concatenate([rounded, rows[..., kept:]], axis=-1)


def native_keys(shape, seed=0):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal(shape) * np.exp(5 * rng.standard_normal((*shape[:-1], 1)))
    return quant.fake_quant_e2m1(jnp.asarray(keys, jnp.bfloat16), stored_keys.GROUP)


def same(found, wanted):
    """The same numbers and signs of zeros, whatever the float type."""
    found, wanted = (np.asarray(x).astype(np.float32).view(np.int32) for x in (found, wanted))
    np.testing.assert_array_equal(found, wanted)


def check_form(form, rows, packed, like, seed):
    """A packed list is of the shape of an empty one and gives back its rows in every way."""
    count = rows.shape[1]
    for ours, theirs in zip(jax.tree.leaves(packed), jax.tree.leaves(like), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert packed.shape == like.shape == rows.shape
    index = np.random.default_rng(seed).integers(0, count, (2, 3, 2))

    @jax.jit
    def read(packed):
        padded = form.unpack(form.pad(packed, 4))[:, :count]
        last = form.block(packed, count - 1, 1)
        return form.unpack(packed), padded, form.take(packed, jnp.asarray(index)), last

    whole, padded, taken, last = read(packed)
    same(whole, rows)
    same(padded, rows)
    same(taken, np.asarray(rows)[np.arange(2)[:, None, None], index])
    same(last, rows[:, count - 1 :])


def check_rows(kept, rope, count, seed):
    rows = native_rows((2, count, kept + rope), rope, seed)
    packed = jax.jit(compact.pack, static_argnums=1)(rows, rope)
    like = jax.eval_shape(lambda: compact.empty((2,), count, kept + rope, rope))
    check_form(compact, rows, packed, like, seed)


def check_keys(width, count, seed):
    keys = native_keys((2, count, width), seed)
    like = jax.eval_shape(lambda: compact_keys.empty((2,), count, width))
    check_form(compact_keys, keys, jax.jit(compact_keys.pack)(keys), like, seed)


@pytest.mark.parametrize("kept, rope", [(16, 8), (131, 3)])
def test_rows_come_back_bit_for_bit(kept, rope):
    check_rows(kept, rope, 5, seed=0)


@pytest.mark.parametrize("width", [16, 165])
def test_keys_come_back_bit_for_bit(width):
    check_keys(width, 5, seed=0)


@pytest.mark.slow  # each width is programs of its own
@DRAWN
@given(
    kept=st.integers(1, 300), rope=st.integers(1, 40), count=st.integers(1, 9), seed=st.integers(0)
)
def test_rows_of_any_width_come_back_bit_for_bit(kept, rope, count, seed):
    check_rows(kept, rope, count, seed)


@pytest.mark.slow
@DRAWN
@given(width=st.integers(1, 300), count=st.integers(1, 9), seed=st.integers(0))
def test_keys_of_any_width_come_back_bit_for_bit(width, count, seed):
    check_keys(width, count, seed)


def test_kernels_get_the_words_that_they_know():
    """Of the released widths; of others rows."""
    count = 300
    rows, keys = native_rows((2, count, 512), 64), native_keys((2, count, 128))
    narrow, few = native_rows((1, 3, 24), 8), native_keys((1, 3, 16))

    @jax.jit
    def forms():
        ours = entries.for_kernels(compact.pack(rows, 64)), stored.pack(rows)
        theirs = key_forms.for_kernels(compact_keys.pack(keys)), stored_keys.pack(keys)
        others = entries.for_kernels(compact.pack(narrow, 8)), compact_keys.pack(few)
        return ours, theirs, (others[0], key_forms.for_kernels(others[1]))

    ours, theirs, others = forms()
    assert meshes.equal(*ours) and meshes.equal(*theirs)
    same(others[0], narrow)
    same(others[1], few)


def test_bytes_of_an_entry():
    rows = jax.eval_shape(lambda: compact.empty((1,), 1024, 512, 64))
    keys = jax.eval_shape(lambda: compact_keys.empty((1,), 1024, 128))
    assert sum(4 * leaf.size for leaf in jax.tree.leaves(rows)) == 584 * 1024
    assert sum(4 * leaf.size for leaf in jax.tree.leaves(keys)) == 68 * 1024


def attention(queries, count, topk, width=40):
    """A call of so many queries with a choice of entries (topk 0: all), and its entries."""
    rng = np.random.default_rng(queries)
    high = rng.integers(1, count + 1, (2, queries)).astype(np.int32)
    chosen = np.stack(
        [
            np.where(order < most, order, -1)
            for most in high.ravel()
            for order in [rng.permutation(count)[: topk or 1]]
        ]
    )
    arguments = {
        "q_BTNH": jnp.asarray(rng.standard_normal((2, queries, 3, width)), jnp.bfloat16),
        "sink_N": jnp.zeros(3),
        "low_BT": jnp.zeros((2, queries), jnp.int32),
        "high_BT": jnp.asarray(high),
    }
    if topk:
        arguments["chosen_BTK"] = jnp.asarray(chosen.reshape(2, queries, -1), jnp.int32)
    return arguments, native_rows((2, count, width), 8)


# One and many queries; their choice gathered and masked, and every entry in several tiles.
CALLS = [(1, 300, 8), (1, 300, 200), (1, 1300, 0), (200, 300, 8), (200, 300, 0)]


@pytest.mark.parametrize("queries, count, topk", CALLS)
def test_attention_is_that_of_the_rows_to_the_bit(queries, count, topk):
    arguments, rows = attention(queries, count, topk)
    packed = compact.pack(rows, 8)
    call = jax.jit(functools.partial(api.sparse_attention, scale=0.2, with_lse=True))
    assert meshes.equal(call(**arguments, entries_BCH=packed), call(**arguments, entries_BCH=rows))


@pytest.mark.parametrize("implementation", ["reference", "pallas_tpu", "pallas_gpu"])
def test_every_implementation_takes_them(implementation):
    arguments, rows = attention(1, 300, 8, width=512)
    rows = native_rows(rows.shape, 64)
    call = jax.jit(
        functools.partial(api.sparse_attention, scale=0.2, implementation=implementation)
    )
    found = [call(**arguments, entries_BCH=x) for x in (compact.pack(rows, 64), stored.pack(rows))]
    assert meshes.equal(*found)


@pytest.mark.parametrize("queries, count", [(1, 1300), (200, 300)])
def test_the_choice_is_that_of_the_keys(queries, count):
    rng = np.random.default_rng(0)
    q = native_keys((2, queries, 2, 16), 1)
    weight = jnp.asarray(rng.standard_normal((2, queries, 2)), jnp.bfloat16)
    keys, low = native_keys((2, count, 16)), jnp.zeros((2, queries), jnp.int32)
    high = jnp.asarray(rng.integers(1, count + 1, (2, queries)), jnp.int32)

    @jax.jit
    def call(keys):
        chosen = indexer.indexer_topk(q, weight, keys, low, high, 9, native=True)
        member = indexer.indexer_member(q, weight, keys, low, high, 9, native=True)
        return chosen, member, indexer.index_scores_at(q, weight, keys, chosen, native=True)

    assert meshes.equal(call(compact_keys.pack(keys)), call(keys))


def test_kernels_choose_from_them():
    keys, q = native_keys((1, 300, 128)), native_keys((1, 1, 2, 128), 1)
    places = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 290, jnp.int32)
    for name in ("pallas_tpu", "pallas_gpu"):
        call = functools.partial(indexer.indexer_topk, topk=9, native=True, implementation=name)
        found = [
            jax.jit(call)(q, jnp.ones((1, 1, 2), jnp.bfloat16), form, *places)
            for form in (compact_keys.pack(keys), stored_keys.pack(keys))
        ]
        assert meshes.equal(*found)


def test_what_they_are_not_for_is_refused():
    arguments, rows = attention(1, 5, 0)
    packed = compact.pack(rows, 8)
    with pytest.raises(NotImplementedError, match="no gradient where the entries are CompactRows"):
        jax.grad(
            lambda q: api.sparse_attention(
                **(arguments | {"q_BTNH": q}), scale=1.0, entries_BCH=packed
            ).sum()
        )(arguments["q_BTNH"].astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="is 40; CompactRows have 24"):
        other = compact.pack(rows[..., 16:], 8)
        api.sparse_attention(**arguments, scale=1.0, entries_BCH=other)
    with pytest.raises(NotImplementedError, match="8 channels wide .z.; CompactKeys have 16"):
        keys = compact_keys.pack(native_keys((2, 5, 16)))
        q, weight = jnp.ones((2, 1, 1, 8)), jnp.ones((2, 1, 1))
        indexer.indexer_topk(q, weight, keys, *[arguments[x] for x in ("low_BT", "high_BT")], 2)
    assert repr(packed).startswith("CompactRows(words=int32[2, 5, 10], low=int32[2, 1, 2, 5], ")
