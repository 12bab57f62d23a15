"""The packed mask: its layout, and the ways in and out."""

import jax
import numpy as np
import pytest

from tests.support.selection import first
from v4jax.kernels import membership

SIZES = (1, 31, 128, 129, 4096, 4097, 9000)


pack = jax.jit(membership.pack)
unpack = jax.jit(membership.unpack, static_argnums=1)
to_indices = jax.jit(membership.to_indices, static_argnums=(1, 2))
from_indices = jax.jit(membership.from_indices, static_argnums=1)


def random_mask(entries, share=0.3):
    return np.random.default_rng(entries).random((2, 3, entries)) < share


def test_words_cover_groups_of_4096():
    assert [membership.words(c) for c in (1, 4096, 4097, 262144)] == [128, 128, 256, 8192]


def test_entry_is_a_bit_of_a_lane_of_a_group():
    entry = 4096 * 1 + 128 * 31 + 5
    mask = np.zeros((1, 1, 9000), bool)
    mask[0, 0, entry] = True
    word = np.asarray(pack(mask))[0, 0]
    assert word[128 * 1 + 5] == 1 << 31
    assert np.count_nonzero(word) == 1


@pytest.mark.parametrize("entries", SIZES)
def test_packed_and_back(entries):
    mask = random_mask(entries)
    word = pack(mask)
    assert word.shape == (2, 3, membership.words(entries))
    np.testing.assert_array_equal(unpack(word, entries), mask)
    beyond = np.asarray(unpack(word, 4096 * -(-entries // 4096)))[:, :, entries:]
    assert not np.any(beyond)


@pytest.mark.parametrize("entries", first([1, 129, 4097], SIZES))
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_indices_and_back(entries, share):
    mask = random_mask(entries, share)
    most = max(1, int(mask.sum(-1).max()))
    wanted = np.full((2, 3, most), -1)
    for row in np.ndindex(2, 3):
        (chosen,) = np.nonzero(mask[row])
        wanted[row][: len(chosen)] = chosen
    word = pack(mask)
    np.testing.assert_array_equal(to_indices(word, most, entries), wanted)
    back = from_indices(wanted, entries)
    np.testing.assert_array_equal(back, word)


def test_indices_beyond_topk_are_left_out():
    mask = np.array([[[True, False, True, True]]])
    word = pack(mask)
    assert to_indices(word, 2, 4).tolist() == [[[0, 2]]]
    assert to_indices(word, 5, 4).tolist() == [[[0, 2, 3, -1, -1]]]
