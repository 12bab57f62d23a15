"""Entries in the forms of a cache: words of FP8 and bf16, and rows in lanes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.support.selection import first
from v4jax import quant
from v4jax.kernels.sparse_attention import api, cases, entries, mass, stored

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
# Rows fetched one by one, chosen under a mask, seen by position; the others are much the same.
QUICK = ("one_query", "chosen_masked", "every_entry")
CASES = first(QUICK, [name for name, case in cases.SMALL.items() if case.entries])


pack, unpack, take, write = map(jax.jit, (stored.pack, stored.unpack, stored.take, stored.write))


@jax.jit
def native(rows):
    """Rows as native numerics rounds them."""
    kept = quant.fake_quant_e4m3(rows[..., : stored.KEPT], stored.GROUP)
    rope = quant.round_to(rows[..., stored.KEPT :], jnp.bfloat16).astype(rows.dtype)
    return jnp.concatenate([kept, rope], axis=-1)


def random_rows(*shape, seed=0):
    """Native rows of very different sizes."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((*shape, stored.WIDTH), np.float32)
    return native(rows * np.exp(5 * rng.standard_normal((*shape, 1), np.float32)))


@pytest.mark.parametrize("entries_", [1, 300])
def test_native_rows_come_back_bit_for_bit(entries_):
    rows = random_rows(2, entries_)
    packed = pack(rows)
    assert packed.shape == rows.shape
    assert np.signbit(unpack(packed)).tolist() == np.signbit(rows).tolist()
    np.testing.assert_array_equal(unpack(packed), rows)
    again = unpack(pack(rows.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(again, rows)


def test_bytes_of_an_entry():
    """584 bytes hold it; with the words that stay zero it has 640."""
    packed = jax.eval_shape(stored.pack, jax.ShapeDtypeStruct((1, 1024, 512), jnp.bfloat16))
    assert sum(leaf.size * 4 for leaf in jax.tree.leaves(packed)) == 640 * 1024


def test_every_code_of_e4m3():
    codes = np.arange(256)
    wanted = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(stored.e4m3(jnp.asarray(codes)), wanted)


def test_layout_by_eye():
    """Channel 130 is byte 1 of word 2; channel 448 + 17 has its low byte in byte 1 of word 1."""
    rows = jnp.zeros((1, 40, 512)).at[0, 33, 130].set(448.0)
    rows = rows.at[0, 33, 448 + 17].set(jnp.float32(1 + 2**-7))
    packed = pack(rows)
    assert stored.byte(packed.words[0, 33, 2], 1) == 0x7E  # E4M3 of 448
    assert stored.byte(packed.words[0, 33, 64 + 17], 3) == 0x3F  # high byte of bf16 0x3f81
    tail = packed.tails[0, 1, 32:64]  # entry 33 = 32 * 1 + 1
    assert stored.byte(tail[1], 1) == 0x81
    assert stored.byte(tail[16], 2) == 127  # group 2, scale 1


def test_taking_and_writing_rows():
    rows, new = random_rows(2, 300), random_rows(2, 3, seed=5)
    packed = pack(rows)
    index = jnp.array([[3, 299, 0], [130, 131, 257]])
    np.testing.assert_array_equal(take(packed, index), jax.jit(entries.take)(rows, index))
    written = write(packed, new, jnp.array([[5, -1, 299], [260, 700, 0]]))
    wanted = np.array(rows)
    wanted[0, [5, 299]], wanted[1, [260, 0]] = new[0, [0, 2]], new[1, [0, 2]]
    np.testing.assert_array_equal(unpack(written), wanted)


def attend(diff, other, implementation):
    static = {name: other[name] for name in ("scale", "window")}
    arrays = {name: x for name, x in other.items() if name not in static}

    @jax.jit
    def run(diff, arrays):
        return api.sparse_attention(**diff, **arrays, **static, implementation=implementation)

    return run(diff, arrays)


@functools.cache
def wide_case(name, dtype=jnp.float32):
    """A small case with rows of the stored width, and its result by the reference."""
    small = cases.SMALL[name]
    # Documents fill their rows; of other cases the first queries are enough.
    length = small.length if small.documents else min(small.length, 40)
    case = dataclasses.replace(small, width=stored.WIDTH, length=length)
    other = {"scale": case.width**-0.5, "window": case.window}

    @jax.jit
    def arrays():
        diff, arrays = cases.make(case, dtype)
        diff["entries_BCH"] = native(diff["entries_BCH"])
        return diff, {name: x for name, x in arrays.items() if name not in other}

    diff, places = arrays()
    other |= places
    return diff, other, attend(diff, other, "reference")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stored_rows_are_the_rows_they_stand_for(implementation, name):
    diff, other, wanted = wide_case(name)
    diff = diff | {"entries_BCH": pack(diff["entries_BCH"])}
    out = attend(diff, other, implementation)
    np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "name"),
    first(
        [("pallas_tpu", "chosen_masked"), ("pallas_gpu", "one_query")],
        itertools.product(["pallas_tpu", "pallas_gpu"], ["one_query", "chosen_masked"]),
    ),
)
def test_in_bf16_they_give_what_the_rows_give(implementation, name):
    """The keys are the same bf16 numbers; a GPU adds the products of 128 channels at a time."""
    diff, other, _ = wide_case(name, jnp.bfloat16)
    rows = attend(diff, other, implementation).astype(jnp.float32)
    diff = diff | {"entries_BCH": pack(diff["entries_BCH"])}
    out = attend(diff, other, implementation).astype(jnp.float32)
    np.testing.assert_allclose(out, rows, atol=2**-8, rtol=2**-8)  # one rounding of the output


# Others than the TPU's kernels read them as rows.
IN_LANES = [("pallas_tpu", "chosen_masked"), *((name, "one_query") for name in IMPLEMENTATIONS)]


@pytest.mark.parametrize(("implementation", "name"), IN_LANES)
def test_rows_in_lanes_are_rows(implementation, name):
    diff, other, wanted = wide_case(name)
    weight = jax.random.normal(jax.random.key(9), wanted.shape)

    @functools.partial(jax.grad, has_aux=True)
    def gradients(diff):
        out = attend(diff, other, implementation)
        return jnp.sum(out * weight), out

    @jax.jit
    def both(diff):
        lanes = diff | {"entries_BCH": entries.in_lanes(diff["entries_BCH"])}
        return gradients(diff), gradients(lanes)

    (grads, rows), (lane_grads, out) = both(diff)
    np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(out, rows)
    lane_grads["entries_BCH"] = entries.as_rows(lane_grads["entries_BCH"])
    jax.tree.map(np.testing.assert_array_equal, lane_grads, grads)


def test_the_mass_of_stored_entries():
    diff, other, _ = wide_case("chosen_masked")
    _, lse = api.sparse_attention(**diff, **other, with_lse=True)
    keys, scale = other["chosen_BTK"], other["scale"]
    forms = (
        diff["entries_BCH"],
        pack(diff["entries_BCH"]),
        entries.in_lanes(diff["entries_BCH"]),
    )
    share = functools.partial(mass.attention_mass, scale=scale)
    found = [jax.jit(share)(diff["q_BTNH"], lse, x, keys) for x in forms]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_stored_rows_have_no_gradient():
    diff, other, _ = wide_case("one_query")
    packed = stored.pack(diff.pop("entries_BCH"))
    with pytest.raises(NotImplementedError, match="no gradient where the entries are StoredRows"):
        jax.grad(lambda d: attend(d | {"entries_BCH": packed}, other, None).sum())(diff)


def test_other_widths_are_refused():
    with pytest.raises(NotImplementedError, match="256 channels wide .*; stored rows have 512"):
        stored.pack(jnp.zeros((1, 1, 256)))
    places = {"low_BT": jnp.zeros((1, 1), jnp.int32), "high_BT": jnp.ones((1, 1), jnp.int32)}
    call = functools.partial(api.sparse_attention, sink_N=jnp.ones(1), scale=1.0, **places)
    q, packed = jnp.ones((1, 1, 1, 64)), stored.pack(jnp.zeros((1, 1, 512)))
    with pytest.raises(NotImplementedError, match="head width .h. is 64; StoredRows have 512"):
        call(q, entries_BCH=packed)
    with pytest.raises(
        NotImplementedError, match="in lanes end in 2 x 128 and .* is 64; supported"
    ):
        call(q, entries_BCH=jnp.zeros((1, 1, 2, 128)))
