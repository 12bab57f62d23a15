"""The indexer's choice against a stable sort: ties, infinities, odd sizes."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from tests.support import places
from tests.support.selection import first
from v4jax.kernels import blocks, membership
from v4jax.kernels.indexer_topk import api, cases, xla
from v4jax.kernels.indexer_topk.gpu import choice as pallas_gpu

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
# Each compiles for seconds, so the Pallas kernels take the cases which differ in path: less than a
# tile, several padded ones, folded entries, the bounds from group maxima in both layouts, packed
# rows. Quick are several tiles, group maxima and the shorter packed rows.
PATHS = (
    "few_entries",
    "odd_heads",
    "two_queries",
    "long_tile",
    "long_decode",
    "packed",
    "packed_reversed",
)
QUICK = ("odd_heads", "long_tile", "packed_reversed")
CHOICES = [("xla", name) for name in cases.NUMERICS] + list(
    itertools.product(("pallas_tpu", "pallas_gpu"), PATHS)
)


@functools.partial(jax.jit, static_argnames=("topk", "native", "implementation"))
def choose(*args, topk, native=False, implementation):
    word = api.indexer_member(*args, topk, native=native, implementation=implementation)
    return membership.unpack(word, args[2].shape[1])


def stable_sort(args, topk, **options):
    return choose(*args, topk=topk, implementation="reference", **options)


@pytest.mark.parametrize(
    ("implementation", "name"),
    first([row for row in CHOICES if row[0] == "xla" or row[1] in QUICK], CHOICES),
)
def test_same_choice_as_a_stable_sort(implementation, name):
    case = cases.NUMERICS[name]
    for rounded in (False, True):
        args = cases.arguments(case, rounded=rounded)
        mask = choose(*args, topk=case.topk, implementation=implementation)
        np.testing.assert_array_equal(mask, stable_sort(args, case.topk))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_choice_through_the_chain_of_bf16(implementation):
    case = cases.NUMERICS["odd_heads"]
    args = cases.arguments(case, jnp.bfloat16)
    # An eighth of a unit: dot products are exact in float32, whatever their order.
    args = (*(jnp.round(8 * x) / 8 for x in args[:3]), *args[3:])
    mask = choose(*args, topk=case.topk, native=True, implementation=implementation)
    np.testing.assert_array_equal(mask, stable_sort(args, case.topk, native=True))
    assert np.any(mask != stable_sort(args, case.topk)), "the chain should change a choice"


INDICES = [(None, name) for name in ("few_entries", "one_query", "odd_heads")] + [
    (implementation, "few_entries") for implementation in ("reference", "pallas_tpu", "pallas_gpu")
]


@pytest.mark.parametrize(("implementation", "name"), INDICES)
def test_indices_of_the_choice(implementation, name):
    case = cases.NUMERICS[name]
    args = cases.arguments(case)
    indices = jax.jit(api.indexer_topk, static_argnames=("topk", "implementation"))
    chosen = np.asarray(indices(*args, topk=case.topk, implementation=implementation))
    assert chosen.shape[-1] == min(case.topk, case.entries)
    mask = np.asarray(stable_sort(args, case.topk))
    for row in np.ndindex(mask.shape[:2]):
        (wanted,) = np.nonzero(mask[row])
        assert chosen[row].tolist() == wanted.tolist() + [-1] * (chosen.shape[-1] - len(wanted))


INF, NAN = np.inf, np.nan
# Scores that can be read off: one head, one channel. (weight, keys, first visible, chosen)
BY_EYE = {
    "ties": (1, [1, 3, 2, 3, 2, 3, -1, -5], 0, [1, 2, 3, 5]),
    "zeros_for_negative_dots": (1, [-1, 3, -2, 3, -2, -3, -1, -5], 0, [0, 1, 2, 3]),
    "minus_infinity_before_the_invisible": (
        -1,
        [INF, 2, INF, 1, INF, 3, INF, INF],
        1,
        [1, 2, 3, 5],
    ),
    "minus_infinity_ties": (-1, [INF, 2, INF, INF, INF, INF, INF, INF], 1, [1, 2, 3, 4]),
    "no_number_counts_as_minus_infinity": (1, [1, NAN, 2, NAN, 0, NAN, NAN, NAN], 0, [0, 1, 2, 4]),
    "infinity_is_the_highest": (1, [1, INF, 2, 3, INF, 0, 4, -1], 0, [1, 3, 4, 6]),
    "minus_infinity_of_a_key_counts_as_zero": (1, [-INF, 3, 2, 1, -INF, 0, 0, -1], 0, [0, 1, 2, 3]),
    "minus_zero_ties_with_zero": (-1, [-1, 0, -1, 0, -1, -1, -1, 5], 1, [1, 2, 3, 4]),
    "at_most_topk_visible": (1, [9, 8, 7, 6, 5, 4, 3, 2], 5, [5, 6, 7]),
    "nothing_visible": (1, [9, 8, 7, 6, 5, 4, 3, 2], 8, []),
}


@pytest.mark.parametrize("name", BY_EYE)
@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "reference"))
def test_choices_by_eye(implementation, name):
    weight, keys, low, chosen = BY_EYE[name]
    q, high = jnp.ones((1, 1, 1, 1)), jnp.full((1, 1), 8)
    keys = jnp.asarray(keys, jnp.float32)[None, :, None]
    args = (q, jnp.full((1, 1, 1), float(weight)), keys, high * 0 + low, high)
    mask = choose(*args, topk=4, implementation=implementation)
    assert np.nonzero(mask[0, 0])[0].tolist() == chosen


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "reference"))
def test_infinite_queries_score_no_numbers(implementation):
    """inf * 0 of a head's weight and inf * 0 of a key tie, and the lower entry wins."""
    q, weight = jnp.full((1, 21, 3, 2), jnp.array([3.0, -INF])), jnp.zeros((1, 21, 3))
    keys = jnp.asarray([[3.0, -1.0]] + [[3.0, -0.0]] * 139)[None]
    low, high = jnp.zeros((1, 21), jnp.int32), jnp.full((1, 21), 140)
    mask = choose(q, weight, keys, low, high, topk=1, implementation=implementation)
    assert mask[:, :, 0].all() and not mask[:, :, 1:].any()


# What hypothesis draws is sizes of few kinds and numbers of every kind: each size is a program.
DRAWN = hypothesis.settings(max_examples=40, deadline=None)
VALUES = np.array([0.0, -0.0, 1.0, 2.0, -1.0, 3.0, INF, -INF, NAN], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(data=strategies.data())
@DRAWN
def test_any_ranges_and_any_values(implementation, data):
    """Ranges in no order; ties, infinities and no numbers in keys, queries and weights.

    The values' sums are exact in any order, and so are those of the chain of bf16.
    """
    batch, entries, heads = 2, data.draw(strategies.sampled_from([140, 700])), 3
    length = data.draw(strategies.sampled_from([1, 21]))
    low, high = data.draw(places.ranges(batch, length, entries))
    rng = np.random.default_rng(data.draw(strategies.integers(0, 2**20)))
    some = data.draw(strategies.sampled_from([4, 6, 8, 9]))  # the first are finite
    finite = data.draw(strategies.booleans())

    def draw(*shape, most=some):
        return jnp.asarray(rng.choice(VALUES[:most], size=shape))

    least = min(some, 6) if finite else some
    q, weight = draw(batch, length, heads, 2, most=least), draw(batch, length, heads, most=least)
    args = (q, weight, draw(batch, entries, 2), low, high)
    topk = data.draw(strategies.sampled_from([1, 7, 60]))
    native = data.draw(strategies.booleans())
    mask = choose(*args, topk=topk, native=native, implementation=implementation)
    np.testing.assert_array_equal(mask, stable_sort(args, topk, native=native))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(data=strategies.data())
@DRAWN
def test_any_documents(implementation, data):
    """Documents of any lengths in batches of rows, their entries in either order."""
    case = cases.Case(
        length=140,
        entries=35,
        topk=data.draw(strategies.sampled_from([1, 6])),
        documents=data.draw(places.documents(140, 2)),
        reverse=data.draw(strategies.booleans()),
    )
    args = cases.arguments(case, rounded=data.draw(strategies.booleans()))
    mask = choose(*args, topk=case.topk, implementation=implementation)
    np.testing.assert_array_equal(mask, stable_sort(args, case.topk))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("values", [9, 8, 6])
@pytest.mark.parametrize("length", [1, 3])
def test_long_rows_of_any_values(length, values, implementation):
    """So many entries that the bounds of the threshold come from groups, and that ties abound."""
    rng = np.random.default_rng(values)
    keys = jnp.asarray(rng.choice(VALUES[:values], size=(1, 9000, 1)))
    q = jnp.ones((1, length, 1, 1))
    low = jnp.asarray(rng.integers(0, 300, (1, length)), jnp.int32)
    args = (q, jnp.ones((1, length, 1)), keys, low, 9000 - low)
    mask = choose(*args, topk=70, implementation=implementation)
    np.testing.assert_array_equal(mask, stable_sort(args, 70))


@pytest.mark.slow
def test_thousands_of_tiny_documents():
    documents = ((1, 2, 3, 4) * 200, (5, 4) * 222)
    case = cases.Case(2000, 1, 2, heads=1, documents=documents)
    args = cases.arguments(case)
    for implementation in IMPLEMENTATIONS:
        mask = choose(*args, topk=case.topk, implementation=implementation)
        np.testing.assert_array_equal(mask, stable_sort(args, case.topk))


def test_order_of_scores_as_integers():
    order = xla.order_preserving(jnp.array([0.0, -0.0, 1.0, -1.0, -np.inf, np.nan]))
    assert order[0] == order[1]
    assert order[2] > order[0] > order[3] > order[4] == order[5] > 0


@pytest.mark.parametrize("implementation", first(["pallas_gpu"], IMPLEMENTATIONS))
def test_all_scores_equal_in_a_long_row(implementation):
    """More candidates than the GPU's kernel keeps apart."""
    entries, topk = pallas_gpu.CANDIDATES + 700, 70
    q, keys, high = jnp.ones((1, 1, 1, 1)), jnp.ones((1, entries, 1)), jnp.full((1, 1), entries)
    args = (q, jnp.ones((1, 1, 1)), keys, high * 0, high)
    mask = choose(*args, topk=topk, implementation=implementation)
    assert np.nonzero(mask[0, 0])[0].tolist() == list(range(topk))


def test_chunks_of_queries_give_the_same_choice(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "WORKSPACE", 2**16)
    case = cases.Case(length=23, entries=60, topk=8, hidden=40)
    args = cases.arguments(case)
    mask = choose(*args, topk=case.topk, implementation="pallas_gpu")
    np.testing.assert_array_equal(mask, stable_sort(args, case.topk))


def test_unknown_implementation():
    args = cases.arguments(cases.NUMERICS["few_entries"])
    with pytest.raises(NotImplementedError, match="no implementation 'cuda'"):
        api.indexer_member(*args, 3, implementation="cuda")


@pytest.mark.parametrize("implementation", ("pallas_tpu", "pallas_gpu"))
def test_half_precision_is_refused_by_name(implementation):
    args = cases.arguments(cases.NUMERICS["few_entries"], jnp.float16)
    with pytest.raises(NotImplementedError, match="q is float16; supported are bfloat16 and"):
        api.indexer_member(*args, 3, implementation=implementation)
    with pytest.raises(NotImplementedError, match="q is float16"):
        api.index_scores(*args[:3], implementation=implementation)


def test_blocks_that_do_not_fit_say_what_they_need():
    case = dataclasses.replace(cases.RELEASED["flash_prefill_4k"], length=16, entries=1 << 22)
    specs = [jax.ShapeDtypeStruct(*spec) for spec in cases.specs(case)]
    function = functools.partial(api.indexer_member, topk=512, implementation="pallas_tpu")
    there = blocks.MEMORY[blocks.chip("tpu")] >> 20
    with pytest.raises(NotImplementedError, match=f"C is 4194304.* MiB of VMEM.*{there} MiB"):
        jax.eval_shape(function, *specs)
