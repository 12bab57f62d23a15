"""Sparse attention: every implementation against full masks and one softmax, with gradients."""

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
from v4jax.kernels import blocks, membership, ranges
from v4jax.kernels.sparse_attention import api, cases, mass, reference, xla
from v4jax.kernels.sparse_attention.plan import Plan, Visible

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
# What differs most for a Pallas kernel: choices under a mask and row by row, packed rows whose
# ranges leave out tiles of queries, and decrease.
QUICK = ("chosen_masked", "one_query", "packed", "packed_reversed")


def sweep(names, quick):
    """Every case for every implementation; of the Pallas kernels' the `quick` ones go first."""
    rows = list(itertools.product(IMPLEMENTATIONS, names))
    return first([row for row in rows if row[0] == "xla" or row[1] in quick], rows)


# The sizes of tiles are the TPU's; those of a GPU are fixed where arrays are float32.
TILES = (blocks.TABLE["v5p"].sparse_attention, blocks.SparseAttention(queries=16, keys=128))


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "window", "topk", "tiles"))
def value_and_gradients(
    diff, weight, arrays, implementation, scale, window, topk=0, tiles=TILES[0]
):
    """The output, and the gradients of its weighted sum."""

    def loss(diff):
        out = api.sparse_attention(
            **diff, **arrays, scale=scale, window=window, topk=topk, implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32) * weight), out

    with blocks.on_trial("v5p", blocks.Blocks(tiles)):
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(diff)
    return out, grads


def made(case, dtype=jnp.float32):
    """A case's arguments: those that are differentiated, static ones, other arrays."""
    diff, arrays = map(dict, _arrays(case, dtype))
    return diff, {"scale": case.width**-0.5, "window": case.window}, arrays


@functools.cache
def _arrays(case, dtype):
    """By one program; not to be changed."""

    @jax.jit
    def arrays():
        diff, other = cases.make(case, dtype)
        return diff, {name: x for name, x in other.items() if name not in ("scale", "window")}

    return arrays()


def weight_like(x):
    return jax.random.normal(jax.random.key(9), x.shape)


@pytest.mark.parametrize(("implementation", "case"), sweep(cases.SMALL, QUICK))
def test_forward_and_gradients(implementation, case):
    check_against_the_reference(cases.SMALL[case], implementation)


def check_against_the_reference(case, implementation):
    diff, static, arrays = made(case)
    check_arrays(diff, arrays, static, implementation)


def check_arrays(diff, arrays, static, implementation):
    weight = weight_like(diff["q_BTNH"])
    out, grads = value_and_gradients(diff, weight, arrays, implementation, **static)
    wanted, wanted_grads = value_and_gradients(diff, weight, arrays, "reference", **static)
    np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        size = np.abs(wanted_grads[name]).max()
        np.testing.assert_allclose(grad, wanted_grads[name], atol=1e-5 * max(size, 1), rtol=1e-5)


# What hypothesis draws is sizes of few kinds and numbers of every kind: each size is a program.
DRAWN = hypothesis.settings(max_examples=40, deadline=None)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(data=strategies.data())
@DRAWN
def test_any_documents(implementation, data):
    """Documents of any lengths in batches of rows, their entries in either order."""
    length, batch = data.draw(strategies.sampled_from([60, 260])), 2
    ratio = data.draw(strategies.sampled_from([1, 4, 128]))
    case = cases.Case(
        length,
        data.draw(strategies.sampled_from([1, 24])),
        max(length // ratio, 1),
        ratio=ratio,
        choices=data.draw(strategies.sampled_from([0, 0, 3])),
        batch=batch,
        documents=data.draw(places.documents(length, batch)),
        reverse=data.draw(strategies.booleans()),
    )
    check_against_the_reference(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(data=strategies.data())
@DRAWN
def test_any_places(implementation, data):
    """Ranges, windows and choices in no order, and such as no document has."""
    batch, entries, count, older = 2, 300, 7, 3
    # Few queries: a TPU fetches rows one by one. More: tiles of them.
    length = data.draw(strategies.sampled_from([11, 45]))
    given = data.draw(strategies.sampled_from(["all", "chosen", "member"]))
    diff, static, arrays = made(cases.Case(length, 8, entries, older=older, batch=batch))
    sink = strategies.sampled_from([-1e30, -30.0, 0.0, 30.0])
    diff["sink_N"] = jnp.asarray(data.draw(strategies.lists(sink, min_size=3, max_size=3)))
    low, high = data.draw(places.ranges(batch, length, entries))
    first = data.draw(places.integers((batch, length), 0, older + length))
    arrays |= {"low_BT": low, "high_BT": high, "first_BT": first}
    if given != "all":
        chosen = data.draw(places.choices(batch, length, entries, count))
        arrays["chosen_BTK"] = chosen
    if given == "member":
        seen = ranges.visible(chosen, *ranges.in_list(low, high, entries))
        arrays["member_BTW"] = membership.from_indices(seen, entries)
        static["topk"] = arrays.pop("chosen_BTK").shape[2]
    static["tiles"] = data.draw(strategies.sampled_from(TILES))
    check_arrays(diff, arrays, static, implementation)


@pytest.mark.parametrize(
    ("implementation", "case"),
    sweep(["chosen_masked", "chosen_gathered", "one_query", "packed_chosen"], ["chosen_masked"]),
)
def test_a_packed_choice_is_the_listed_one(implementation, case):
    diff, static, arrays = made(cases.SMALL[case])
    weight = weight_like(diff["q_BTNH"])
    listed = value_and_gradients(diff, weight, arrays, implementation, **static)
    chosen = arrays.pop("chosen_BTK")
    arrays["member_BTW"] = membership.from_indices(chosen, diff["entries_BCH"].shape[1])
    static["topk"] = chosen.shape[2]
    packed = value_and_gradients(diff, weight, arrays, implementation, **static)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), listed, packed)


@pytest.mark.parametrize(
    ("implementation", "case"),
    sweep(["every_entry", "chosen_masked", "chosen_gathered", "packed"], ["chosen_masked"]),
)
def test_bf16_is_as_near_as_bf16_can_be(implementation, case):
    """The error beside float32 is at most twice that of the reference computed in bf16."""
    diff, static, arrays = made(cases.SMALL[case], jnp.bfloat16)
    weight = weight_like(diff["q_BTNH"])
    exact = {name: x.astype(jnp.float32) for name, x in diff.items()}
    wanted, wanted_grads = value_and_gradients(exact, weight, arrays, "reference", **static)
    rounded, rounded_grads = bf16_reference(diff, weight, arrays, **static)
    out, grads = value_and_gradients(diff, weight, arrays, implementation, **static)
    assert out.dtype == jnp.bfloat16
    assert error(out, wanted) <= 2 * error(rounded, wanted)
    for name, grad in grads.items():
        assert error(grad, wanted_grads[name]) <= 2 * error(rounded_grads[name], wanted_grads[name])


def error(x, wanted):
    """The error's norm: its maximum over a sink's few numbers is a matter of luck."""
    return float(np.linalg.norm((np.asarray(x, np.float32) - np.asarray(wanted)).ravel()))


@functools.partial(jax.jit, static_argnames=("scale", "window"))
def bf16_reference(diff, weight, arrays, scale, window):
    """The reference's equations with the results of every step rounded to bf16."""

    def rounded(x):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def loss(diff):
        q, sink = (diff[name].astype(jnp.float32) for name in ("q_BTNH", "sink_N"))
        keys, masks = [], []
        if "window_BSH" in diff:
            rows = diff["window_BSH"]
            keys.append(rows)
            masks.append(reference.window_mask(arrays["first_BT"], rows.shape[1], window))
        places = Visible(None, arrays["low_BT"], arrays["high_BT"], arrays.get("chosen_BTK"))
        keys.append(diff["entries_BCH"])
        masks.append(reference.entry_mask(keys[-1].shape[1], places))
        kv = jnp.concatenate(keys, axis=1).astype(jnp.float32)
        scores = rounded(jnp.einsum("btnh,bkh->btnk", q, kv) * scale)
        scores = jnp.where(jnp.concatenate(masks, axis=2)[:, :, None], scores, -jnp.inf)
        top = jnp.broadcast_to(sink[None, None, :, None], (*scores.shape[:3], 1))
        p = rounded(jax.nn.softmax(jnp.concatenate([scores, top], axis=-1), axis=-1))
        out = rounded(jnp.einsum("btnk,bkh->btnh", p[..., :-1], kv))
        return jnp.sum(out * weight), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(diff)
    return out, grads


def test_masks_by_eye():
    """Window 2 with one older row; row 1 of the batch may not see it."""
    first = jnp.array([[0, 0, 0], [1, 1, 1]])
    mask = reference.window_mask(first, 4, 2).astype(int)
    assert mask[0].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask[1].tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    low, high = jnp.array([[0, 1, 1]]), jnp.array([[0, 2, 3]])
    visible = reference.entry_mask(3, Visible(None, low, high)).astype(int)
    assert visible[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    chosen = jnp.array([[[-1, -1], [1, -1], [2, -1]]])
    picked = reference.entry_mask(3, Visible(None, low, high, chosen)).astype(int)
    assert picked[0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_attends_to_the_sink(implementation):
    q, sink = jnp.ones((1, 1, 2, 4)), jnp.zeros(2)
    places = {"low_BT": jnp.array([[3]]), "high_BT": jnp.array([[3]])}
    entries = jnp.ones((1, 5, 4))
    out = api.sparse_attention(
        q, sink, scale=1.0, entries_BCH=entries, implementation=implementation, **places
    )
    assert np.all(out == 0)


def test_both_ways_to_meet_the_chosen_entries_are_tested():
    for case, gathers in (("chosen_masked", False), ("chosen_gathered", True)):
        small = cases.SMALL[case]
        plan = Plan(1.0, small.window, small.choices)
        assert xla._gathers(plan, jnp.zeros((1, small.entries, 1))) == gathers


def test_unknown_implementation_is_named():
    with pytest.raises(NotImplementedError, match="no implementation 'cuda'"):
        api.sparse_attention(jnp.ones((1, 1, 1, 2)), jnp.ones(1), scale=1.0, implementation="cuda")


def test_what_a_kernel_cannot_take_is_said():
    q = jnp.ones((1, 1, 1, 2), jnp.float16)
    with pytest.raises(NotImplementedError, match="q is float16; supported: float32, bfloat16"):
        api.sparse_attention(q, jnp.ones(1), scale=1.0, implementation="pallas_tpu")
    q = jnp.ones((1, 1, 1, 1024), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="is 1024; supported: at most 512"):
        api.sparse_attention(q, jnp.ones(1), scale=1.0, implementation="pallas_gpu")


@pytest.mark.parametrize(
    "case",
    first(
        ["every_entry", "chosen_masked"],
        ["every_entry", "chosen_masked", "one_query", "packed_chosen", "packed_reversed"],
    ),
)
def test_the_mass_of_each_entry_is_its_share_of_the_joint_softmax(case):
    small = cases.SMALL[case]
    diff, static, arrays = made(small)
    entries, (batch, length) = diff["entries_BCH"], diff["q_BTNH"].shape[:2]
    attend = jax.jit(functools.partial(api.sparse_attention, **static, with_lse=True))
    _, lse = attend(**diff, **arrays)
    keys = arrays.get("chosen_BTK")
    if keys is None:
        count = entries.shape[1]
        entry = np.broadcast_to(np.arange(count, dtype=np.int32), (batch, length, count))
        low, high = (np.asarray(arrays[name])[..., None] for name in ("low_BT", "high_BT"))
        keys = jnp.asarray(np.where((entry >= low) & (entry < high), entry, -1))
    share = jax.jit(functools.partial(mass.attention_mass, scale=static["scale"]))
    found = share(diff["q_BTNH"], lse, entries, keys)
    plan = Plan(static["scale"], small.window, small.choices)
    places = Visible(
        arrays["first_BT"], arrays["low_BT"], arrays["high_BT"], arrays.get("chosen_BTK")
    )
    joint = jax.jit(lambda diff: joint_probabilities(plan, diff, places))(diff)
    wanted = np.asarray(joint)[..., diff["window_BSH"].shape[1] :].sum(2)
    wanted = np.take_along_axis(wanted, np.maximum(keys, 0), axis=2)
    np.testing.assert_allclose(found, np.where(keys >= 0, wanted, 0), atol=1e-5)


def joint_probabilities(plan, diff, places):
    """[B,T,N,S+C]: every key's probability beside the sink's."""
    rows, entries = diff["window_BSH"], diff["entries_BCH"]
    mask = [reference.window_mask(places.first, rows.shape[1], plan.window)]
    mask.append(reference.entry_mask(entries.shape[1], places))
    kv = jnp.concatenate([rows, entries], axis=1)
    scores = jnp.einsum("btnh,bkh->btnk", diff["q_BTNH"], kv) * plan.scale
    scores = jnp.where(jnp.concatenate(mask, axis=2)[:, :, None], scores, -jnp.inf)
    sink = jnp.broadcast_to(diff["sink_N"][None, None, :, None], (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
