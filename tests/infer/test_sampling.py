import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from v4jax.errors import InputError
from v4jax.infer import sampling
from v4jax.infer.sampling import Sampling

OUT = -np.inf
sample = jax.jit(sampling.sample)
filtered = jax.jit(sampling.filtered)
filter_top_k = jax.jit(sampling.filter_top_k)
filter_top_p = jax.jit(sampling.filter_top_p)
filter_min_p = jax.jit(sampling.filter_min_p)
row_keys = jax.jit(sampling.row_keys, static_argnums=1)


def log(*probabilities):
    return jnp.log(jnp.array([probabilities], jnp.float32))


def kept(logits_BV):
    """The token ids that a filter left, of the only row."""
    return np.flatnonzero(np.isfinite(np.asarray(logits_BV)[0])).tolist()


def draw(logits_V, setting, draws=20_000, seed=0):
    """How often each token is drawn."""
    keys_B = row_keys(jax.random.key(seed), draws, 0)
    logits_BV = jnp.tile(jnp.asarray(logits_V).reshape(1, -1), (draws, 1))
    tokens_B = sample(logits_BV, keys_B, setting)
    assert tokens_B.dtype == jnp.int32
    return np.bincount(np.asarray(tokens_B), minlength=logits_BV.shape[1])


def assert_frequencies(counts, probabilities):
    """Pearson's chi-square; the limit is passed by chance once in ten thousand seeds."""
    expected = np.array(probabilities) * counts.sum()
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = seen.sum() - 1
    assert chi_square < freedom + 3.8 * np.sqrt(2 * freedom) + 10


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id():
    logits_BV = jnp.array([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-5.0, -4.0, -9.0, -1.0]])
    keys_B = row_keys(jax.random.key(0), 3, 0)
    assert sample(logits_BV, keys_B, Sampling()).tolist() == [1, 0, 3]


@hypothesis.settings(deadline=None)
@hypothesis.given(
    temperature=strategies.sampled_from([0.0, 1e-300, 1e-46, 1e-40, 1.2e-38, 1e-20, 1.0, 1e39]),
    top_k=strategies.sampled_from([0, 1, 2, 2**31 - 1]),
    top_p=strategies.sampled_from([5e-324, 1e-46, 1e-40, 1e-38, 0.3, 1 - 1e-9, 1.0]),
    min_p=strategies.sampled_from([0.0, 5e-324, 1e-46, 1e-38, 0.5, 1.0]),
    best=strategies.integers(0, 4),
)
def test_extreme_settings_keep_the_likeliest_token(temperature, top_k, top_p, min_p, best):
    """What leaves only the likeliest token draws it; no token of no probability is drawn."""
    logits_BV = jnp.array([[1.0, 0.5, -2.0, 0.0, -jnp.inf]]).at[0, best].set(9.0)
    setting = sampling.check(Sampling(temperature, top_k, top_p, min_p))
    token = int(sample(logits_BV, row_keys(jax.random.key(0), 1, 0), setting)[0])
    alone = temperature < 1e-19 or top_k == 1 or top_p < 0.1 or min_p == 1.0
    assert token == best if alone else logits_BV[0, token] > -jnp.inf


TINY = np.finfo(np.float32).tiny
logits_of_six = strategies.lists(
    strategies.one_of(
        strategies.floats(-20, 20, width=32),
        strategies.sampled_from([-np.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38]),
    ),
    min_size=6,
    max_size=6,
).filter(lambda logits: max(logits) > -np.inf)


def power_of_ten(lowest, highest):
    return strategies.floats(lowest, highest).map(lambda exponent: 10.0**exponent)


def bounds(logits_V, setting):
    """Which tokens stay for certain, and which may: by sorting, in float64."""
    min_p = setting.min_p if setting.min_p >= TINY else 0.0
    rank_V = np.argsort(np.argsort(-logits_V, kind="stable"), kind="stable")
    stay_V = (rank_V < setting.top_k) | (setting.top_k == 0)
    mass_V = np.where(stay_V, np.exp((logits_V - logits_V.max()) / setting.temperature), 0)
    share_V = mass_V / mass_V.sum()
    before_V = np.array([share_V[rank_V < rank].sum() for rank in rank_V])
    possible_V = stay_V & (before_V < setting.top_p + 1e-5) & (mass_V >= 0.999 * min_p)
    sure_V = stay_V & (before_V < setting.top_p - 1e-5) & (mass_V >= 1.001 * min_p)
    return (sure_V & (mass_V > 1e-30)) | (rank_V == 0), possible_V


@hypothesis.settings(deadline=None)
@hypothesis.given(
    logits_of_six,
    power_of_ten(-320, 300),
    strategies.integers(0, 7),
    strategies.one_of(strategies.floats(0, 1, exclude_min=True), power_of_ten(-320, 0)),
    strategies.one_of(strategies.floats(0, 1), power_of_ten(-320, 0)),
)
def test_any_settings_of_any_logits_keep_what_sorting_keeps(logits, temperature, k, top_p, min_p):
    """Over all magnitudes: infinite, equal and vanishing logits, signed zeros, settings near 0."""
    setting = sampling.check(Sampling(temperature, k, top_p, min_p))
    logits_V = np.array(logits, np.float32)
    token = int(sample(logits_V[None], row_keys(jax.random.key(k), 1, 0), setting)[0])
    logits_V[np.abs(logits_V) < TINY] = 0.0  # as XLA compares them
    if not setting.temperature:
        assert logits_V[token] == logits_V.max()
        return
    sure_V, possible_V = bounds(logits_V.astype(np.float64), setting)
    kept_V = np.asarray(filtered(logits_V[None], setting))[0] > -np.inf
    assert (kept_V | ~sure_V).all() and (possible_V | ~kept_V).all() and kept_V[token]


def test_greedy_ignores_the_filters():
    logits_BV = log(0.4, 0.6)
    keys_B = row_keys(jax.random.key(0), 1, 0)
    setting = Sampling(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)
    assert sample(logits_BV, keys_B, setting).tolist() == [1]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])],
)
def test_top_k(top_k, expected):
    assert kept(filter_top_k(log(0.3, 0.1, 0.4, 0.2), top_k)) == expected


def test_top_k_of_equals_keeps_the_lowest_ids():
    logits_BV = jnp.array([[1.0, 0.0, 1.0, -1.0, 1.0]])
    assert kept(filter_top_k(logits_BV, 2)) == [0, 2]
    assert kept(filter_top_k(jnp.array([[-0.0, 0.0, -1.0]]), 1)) == [0]


@pytest.mark.parametrize("temperature", [1e30, 8e37, 3e38])
def test_no_temperature_hides_which_tokens_are_likelier(temperature):
    """Divided by it, float32 flushes what tells these logits apart to 0."""
    logits_BV = jnp.array([[1.0, 1.05, 1.1, 1.0]])
    for setting in (Sampling(temperature, top_k=2), Sampling(temperature, top_p=0.4)):
        assert kept(filtered(logits_BV, sampling.check(setting))) == [1, 2]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [2]),
        (0.39, [2]),
        (0.41, [0, 2]),
        (0.69, [0, 2]),
        (0.71, [0, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_with_that_mass(top_p, expected):
    assert kept(filter_top_p(log(0.3, 0.1, 0.4, 0.2), top_p)) == expected


def test_top_p_is_reached_by_an_equal_mass():
    assert kept(filter_top_p(log(0.25, 0.5, 0.125, 0.125), 0.75)) == [0, 1]


def test_top_p_of_equals_keeps_the_lowest_ids():
    assert kept(filter_top_p(jnp.zeros((1, 8)), 0.5)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.24, [0, 1, 2, 3]), (0.3, [0, 2, 3]), (0.6, [0, 2]), (1.0, [2])]
)
def test_min_p_is_relative_to_the_likeliest(min_p, expected):
    assert kept(filter_min_p(log(0.3, 0.1, 0.4, 0.2), min_p)) == expected


def test_filters_leave_the_logits_they_keep_as_they_are():
    logits_BV = jnp.array([[1.0, -2.0, 3.0]])
    np.testing.assert_array_equal(filter_top_k(logits_BV, 2), [[1.0, OUT, 3.0]])


@pytest.mark.parametrize("values", [5, 40, 100_000])
def test_top_k_and_top_p_agree_with_sorting(values):
    """Few different values make many ties, also across the sign of zero."""
    rng = np.random.default_rng(values)
    logits_BV = (rng.integers(-values, values, (6, 501)) / 7.0).astype(np.float32)
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")
    rank_BV = np.argsort(order_BV, axis=-1, kind="stable")
    for top_k in (1, 7, 500):
        kept_BV = np.isfinite(filter_top_k(jnp.asarray(logits_BV), top_k))
        np.testing.assert_array_equal(kept_BV, rank_BV < top_k)
    mass_BV = np.exp(logits_BV.astype(np.float64) - logits_BV.max(axis=-1, keepdims=True))
    mass_BV /= mass_BV.sum(axis=-1, keepdims=True)
    sorted_BV = np.take_along_axis(mass_BV, order_BV, axis=-1)
    before_BV = np.take_along_axis(np.cumsum(sorted_BV, axis=-1) - sorted_BV, rank_BV, axis=-1)
    for top_p in (0.1, 0.77, 0.95):
        kept_BV = np.isfinite(filter_top_p(jnp.asarray(logits_BV), top_p))
        differ_BV = kept_BV != (before_BV < top_p)
        # Where a token's mass begins within rounding of top_p, either answer is right.
        np.testing.assert_array_less(np.abs(before_BV - top_p)[differ_BV], 1e-5)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
        (Sampling(temperature=1.0, top_k=3), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(temperature=1.0, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.45), [4 / 9, 3 / 9, 2 / 9, 0]),
        # Of 0.4 and 0.3 alone the first has a mass of 0.57: top-p comes after top-k.
        (Sampling(temperature=1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
        # At temperature 0.5 the first has 0.53: top-p comes after the temperature too.
        (Sampling(temperature=0.5, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(temperature=1e-30), [1, 0, 0, 0]),
    ],
)
def test_frequencies(setting, expected):
    assert_frequencies(draw(log(0.4, 0.3, 0.2, 0.1), setting), expected)


def test_a_draw_depends_on_its_seed_row_and_step_only():
    logits_BV = jax.random.normal(jax.random.key(1), (5, 300))
    setting = Sampling(temperature=2.0)
    tokens = {}
    for seed in (0, 1):
        for step in (0, 1):
            keys_B = row_keys(jax.random.key(seed), 5, step)
            tokens[seed, step] = sample(logits_BV, keys_B, setting)
            np.testing.assert_array_equal(
                sample(logits_BV[:2], keys_B[:2], setting), tokens[seed, step][:2]
            )
    keys_B = row_keys(jax.random.key(0), 5, 0)
    np.testing.assert_array_equal(sample(logits_BV, keys_B, setting), tokens[0, 0])
    assert len({tuple(row.tolist()) for row in tokens.values()}) == 4


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (Sampling(temperature=-0.1), "temperature is -0.1"),
        (Sampling(temperature=np.nan), "temperature is nan"),
        (Sampling(temperature=np.inf), "temperature is inf"),
        (Sampling(top_k=-1), "top_k is -1"),
        (Sampling(top_k=1.5), "top_k is 1.5"),
        (Sampling(top_p=0.0), "top_p is 0.0"),
        (Sampling(top_p=1.01), "top_p is 1.01"),
        (Sampling(min_p=-0.1), "min_p is -0.1"),
        (Sampling(min_p=2), "min_p is 2"),
    ],
)
def test_values_out_of_range_are_named(setting, name):
    with pytest.raises(InputError, match=name):
        sampling.check(setting)
