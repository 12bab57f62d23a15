"""Index keys in the four bits that they are stored in: the same choice as of the keys expanded."""

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
from v4jax.kernels.indexer_topk import api, cases, stored_keys

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
# Of every layout: less than a tile, two folded queries, several tiles of queries and of keys.
QUICK = [
    ("reference", "few_entries"),
    ("xla", "few_entries"),
    *itertools.product(IMPLEMENTATIONS[1:], ["odd_heads"]),
    *itertools.product(IMPLEMENTATIONS[2:], ["few_entries", "two_queries"]),
]


pack, unpack, write = map(jax.jit, (stored_keys.pack, stored_keys.unpack, stored_keys.write))
rounded = jax.jit(functools.partial(quant.fake_quant_e2m1, group=stored_keys.GROUP))


def test_native_keys_come_back_bit_for_bit():
    keys = jax.random.normal(jax.random.key(0), (2, 37, 128))
    keys = keys * jnp.exp(5 * jax.random.normal(jax.random.key(1), (2, 37, 1)))
    for dtype in (jnp.float32, jnp.bfloat16):
        native = rounded(keys.astype(dtype))
        packed = pack(native)
        assert packed.shape == keys.shape
        np.testing.assert_array_equal(unpack(packed), native.astype(jnp.float32))


def test_bytes_of_a_key():
    packed = jax.eval_shape(stored_keys.pack, jax.ShapeDtypeStruct((1, 1000, 128), jnp.bfloat16))
    assert sum(leaf.size * 4 for leaf in jax.tree.leaves(packed)) == 68 * 1000


def test_every_code_of_e2m1():
    codes = np.arange(16)
    wanted = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(stored_keys.e2m1(jnp.asarray(codes)), wanted)


def test_layout_by_eye():
    """Channel 35 is nibble 2 of word 3, its scale byte 1."""
    keys = jnp.zeros((1, 7, 128)).at[0, 5, 35].set(-6.0).at[0, 5, 127].set(12.0)
    packed = pack(keys)
    assert stored_keys.nibble(packed.codes[0, 3, 5], 2) == 0b1111
    assert (packed.scales[0, 0, 5] >> 8) & 255 == 127
    assert (packed.scales[0, 0, 5] >> 24) & 255 == 128


def test_writing_keys():
    keys, new = (jax.random.normal(jax.random.key(i), (2, n, 128)) for i, n in ((0, 9), (1, 3)))
    keys, new = (rounded(x) for x in (keys, new))
    written = write(pack(keys), new, jnp.array([[4, -1, 9], [8, 0, 2]]))
    wanted = np.array(keys)
    wanted[0, 4], wanted[1, [8, 0, 2]] = new[0, 0], new[1]
    np.testing.assert_array_equal(unpack(written), wanted)


@functools.partial(jax.jit, static_argnames=("topk", "native", "implementation"))
def choose(*arguments, topk, native=False, implementation):
    return api.indexer_topk(*arguments, topk, native=native, implementation=implementation)


def arguments(name, dtype):
    """A case of the official width with native queries and keys: scores are exact in float32."""
    case = dataclasses.replace(cases.NUMERICS[name], width=128)
    q, weight, keys, low, high = cases.arguments(case, dtype)
    weight = jnp.round(4 * weight) / 4
    return case, (*(rounded(x) for x in (q, keys)), weight, low, high)


@pytest.mark.parametrize(
    ("implementation", "name"),
    first(QUICK, itertools.product(IMPLEMENTATIONS, cases.NUMERICS)),
)
def test_the_choice_is_that_of_the_expanded_keys(implementation, name):
    for dtype, native in ((jnp.float32, False), (jnp.bfloat16, True)):
        case, (q, keys, weight, low, high) = arguments(name, dtype)
        packed = pack(keys)
        run = functools.partial(choose, topk=case.topk, native=native)
        wanted = run(q, weight, keys, low, high, implementation="xla")
        chosen = run(q, weight, packed, low, high, implementation=implementation)
        np.testing.assert_array_equal(chosen, wanted)


def test_the_packed_choice():
    case, (q, keys, weight, low, high) = arguments("few_entries", jnp.float32)
    member = jax.jit(functools.partial(api.indexer_member, topk=case.topk))
    packed = pack(keys)
    np.testing.assert_array_equal(
        member(q, weight, packed, low, high), member(q, weight, keys, low, high)
    )


def test_other_widths_are_refused():
    with pytest.raises(NotImplementedError, match="64 channels wide .z.; stored keys have 128"):
        stored_keys.pack(jnp.zeros((1, 1, 64)))
    q, weight, _, low, high = cases.arguments(cases.NUMERICS["few_entries"])
    packed = stored_keys.pack(jnp.zeros((2, 5, 128)))
    with pytest.raises(NotImplementedError, match="8 channels wide .z.; StoredKeys have 128"):
        api.indexer_member(q, weight, packed, low, high, 3)
