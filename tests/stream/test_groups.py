import numpy as np
import pytest

from v4jax.streamed.groups import groups_of, largest_group


def test_rows_of_a_group_by_hand():
    # Three tokens with two choices each; the last one is padding.
    chosen = np.array([[4, 1], [1, 0], [3, 2]])
    (group,) = groups_of(chosen, np.array([True, True, False]), experts=5, most=5)
    assert group.experts.tolist() == [0, 1, 4]
    assert group.sizes_E.tolist() == [1, 2, 1, 0]
    assert group.source_R.tolist() == [3, 1, 2, 0]
    assert group.room == 4


def test_no_token_needs_no_expert():
    assert groups_of(np.array([[1, 2]]), np.array([False]), experts=5, most=5) == ()


@pytest.mark.parametrize("seed", range(20))
def test_every_choice_is_in_one_group(seed):
    rng = np.random.default_rng(seed)
    experts, tokens = int(rng.integers(2, 40)), int(rng.integers(1, 30))
    k, most = int(rng.integers(1, min(experts, 6) + 1)), int(rng.integers(1, 50))
    chosen = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    real = rng.random(tokens) < 0.8
    groups = groups_of(chosen, real, experts, most)
    found = {}
    for group in groups:
        assert len(group.experts) <= group.room <= largest_group(experts, most)
        assert group.room == groups[0].room
        assert group.source_R.shape == groups[0].source_R.shape
        ends = np.cumsum(group.sizes_E)
        for number, expert in enumerate(group.experts.tolist()):
            for row in group.source_R[ends[number] - group.sizes_E[number] : ends[number]]:
                assert row not in found
                found[int(row)] = expert
        assert all(group.source_R[ends[-1] :] == chosen.size)
    flat = chosen.reshape(-1)
    assert found == {row: flat[row] for row in range(chosen.size) if real[row // k]}


@pytest.mark.parametrize(
    ("experts", "most", "largest"), [(256, 38, 32), (256, 300, 256), (6, 6, 6), (6, 1, 1)]
)
def test_largest_group(experts, most, largest):
    assert largest_group(experts, most) == largest
