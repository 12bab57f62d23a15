"""The indexer's choice against a stable sort, and its scores and gradients, ties and all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import blocks, membership
from v4jax.kernels.indexer_topk import api, cases, pallas_gpu, reference, xla

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
# Long enough for the bound from group maxima, and for more candidates than are kept apart.
LONG = {
    "long_decode": cases.Case(1, 40000, 60, 160000, batch=1, heads=2),
    "long_tile": cases.Case(3, 9000, 70, 36000, batch=1, heads=2),
}


@functools.partial(jax.jit, static_argnames=("topk", "chain", "implementation"))
def choose(*args, topk, chain=False, implementation):
    word = api.indexer_member(*args, topk, chain=chain, implementation=implementation)
    return membership.unpack(word, args[2].shape[1])


def chosen_mask(args, topk, **options):
    chosen = api.indexer_topk(*args, topk, implementation="reference", **options)
    return membership.unpack(membership.from_indices(chosen, args[2].shape[1]), args[2].shape[1])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", cases.NUMERICS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_choice_as_a_stable_sort(implementation, name, rounded):
    case = cases.NUMERICS[name]
    args = cases.arguments(case, rounded=rounded)
    mask = choose(*args, topk=case.topk, implementation=implementation)
    np.testing.assert_array_equal(mask, chosen_mask(args, case.topk))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("implementation", ("pallas_tpu", "pallas_gpu"))
def test_same_choice_in_a_long_row(implementation, name, rounded):
    case = LONG[name]
    args = cases.arguments(case, rounded=rounded)
    mask = choose(*args, topk=case.topk, implementation=implementation)
    np.testing.assert_array_equal(mask, chosen_mask(args, case.topk))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_choice_through_the_chain_of_bf16(implementation, dtype):
    case = cases.NUMERICS["odd_heads"]
    args = cases.arguments(case, dtype)
    # An eighth of a unit: dot products are exact in float32, whatever their order.
    args = (*(jnp.round(8 * x) / 8 for x in args[:3]), *args[3:])
    mask = choose(*args, topk=case.topk, chain=True, implementation=implementation)
    np.testing.assert_array_equal(mask, chosen_mask(args, case.topk, chain=True))
    assert np.any(mask != chosen_mask(args, case.topk)), "the chain should change a choice"


@pytest.mark.parametrize("implementation", ("xla", "reference"))
@pytest.mark.parametrize("name", cases.NUMERICS)
def test_indices_of_the_choice(implementation, name):
    case = cases.NUMERICS[name]
    args = cases.arguments(case)
    chosen = np.asarray(api.indexer_topk(*args, case.topk, implementation=implementation))
    assert chosen.shape[-1] == min(case.topk, case.entries)
    mask = np.asarray(chosen_mask(args, case.topk))
    for row in np.ndindex(mask.shape[:2]):
        (wanted,) = np.nonzero(mask[row])
        assert chosen[row].tolist() == wanted.tolist() + [-1] * (chosen.shape[-1] - len(wanted))


@pytest.mark.parametrize("implementation", ("pallas_tpu", "pallas_gpu"))
def test_indices_through_the_mask(implementation):
    case = cases.NUMERICS["odd_heads"]
    args = cases.arguments(case)
    chosen = api.indexer_topk(*args, case.topk, implementation=implementation)
    wanted = api.indexer_topk(*args, case.topk, implementation="reference")
    np.testing.assert_array_equal(chosen, wanted)


def one_query(keys, weight=1.0):
    """Scores that can be read off: one head, one channel, one query that sees everything."""
    q, keys = jnp.ones((1, 1, 1, 1)), jnp.asarray(keys, jnp.float32)[None, :, None]
    high = jnp.full((1, 1), keys.shape[1])
    return q, jnp.full((1, 1, 1), weight), keys, jnp.zeros_like(high), high


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "reference"))
def test_equal_scores_go_to_the_lower_index(implementation):
    args = one_query([1.0, 3, 2, 3, 2, 3, -1, -5])
    for topk, wanted in ((2, [1, 3]), (4, [1, 2, 3, 5]), (7, [0, 1, 2, 3, 4, 5, 6])):
        mask = choose(*args, topk=topk, implementation=implementation)
        assert np.nonzero(mask[0, 0])[0].tolist() == wanted


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "reference"))
def test_rows_of_minus_infinity_come_last_but_before_the_invisible(implementation):
    inf = np.inf
    args = one_query([inf, 2, inf, 1, inf, 3], weight=-1.0)  # scores -inf -2 -inf -1 -inf -3
    args = (*args[:3], args[3] + 1, args[4])
    for topk, wanted in ((3, [1, 3, 5]), (4, [1, 2, 3, 5]), (5, [1, 2, 3, 4, 5])):
        mask = choose(*args, topk=topk, implementation=implementation)
        assert np.nonzero(mask[0, 0])[0].tolist() == wanted


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "reference"))
def test_a_score_that_is_no_number_counts_as_minus_infinity(implementation):
    args = one_query([1.0, np.nan, 2, np.nan, 0])
    for topk, wanted in ((3, [0, 2, 4]), (4, [0, 1, 2, 4])):
        mask = choose(*args, topk=topk, implementation=implementation)
        assert np.nonzero(mask[0, 0])[0].tolist() == wanted


def test_minus_zero_ties_with_zero():
    scores = jnp.array([0.0, -0.0, 1.0, -1.0])
    order = xla.order_preserving(scores)
    assert order[0] == order[1]
    assert order[2] > order[0] > order[3] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_minus_zero_scores_tie_with_zero(implementation):
    # relu gives 0 everywhere; a negative weight makes it -0.
    args = one_query([-1.0] * 6, weight=-1.0)
    mask = choose(*args, topk=2, implementation=implementation)
    assert np.nonzero(mask[0, 0])[0].tolist() == [0, 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_visible_chooses_nothing(implementation):
    args = cases.arguments(cases.Case(length=5, entries=40, topk=8))
    empty = (*args[:3], args[3] * 0, args[4] * 0)
    assert not np.any(choose(*empty, topk=8, implementation=implementation))
    assert np.all(api.indexer_topk(*empty, 8) == -1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_scores_equal_in_a_long_row(implementation):
    entries, topk = pallas_gpu.CANDIDATES + 700, 70
    args = one_query(np.ones(entries))
    mask = choose(*args, topk=topk, implementation=implementation)
    assert np.nonzero(mask[0, 0])[0].tolist() == list(range(topk))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_of_queries_give_the_same_choice(implementation, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "WORKSPACE", 2**16)
    case = cases.Case(length=23, entries=60, topk=8, hidden=40)
    args = cases.arguments(case)
    mask = choose(*args, topk=case.topk, implementation=implementation)
    np.testing.assert_array_equal(mask, chosen_mask(args, case.topk))


SCORED = {
    "tile": cases.Case(length=20, entries=300, topk=0),
    "one_query": cases.Case(length=1, entries=7, topk=0),
    "odd": cases.Case(length=17, entries=129, topk=0, heads=3, width=24),
}


def scores_and_gradients(function, q, weight, keys, g):
    scores, backward = jax.vjp(function, q, weight, keys)
    return dict(zip(("scores", "dq", "dweight", "dkeys"), (scores, *backward(g)), strict=True))


def of(implementation):
    return functools.partial(api.index_scores, implementation=implementation)


def cotangent(case):
    return jax.random.normal(jax.random.key(5), (case.batch, case.length, case.entries))


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_and_gradients_in_float32(implementation, name):
    args = cases.arguments(SCORED[name])[:3]
    g = cotangent(SCORED[name])
    wanted = scores_and_gradients(reference.index_scores, *args, g)
    for key, value in scores_and_gradients(of(implementation), *args, g).items():
        scale = float(jnp.abs(wanted[key]).max())
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


def in_bf16(q, weight, keys):
    """The reference, every array of which is bf16."""
    dots = jnp.einsum("btiz,bcz->btic", q, keys)
    return jnp.einsum("btic,bti->btc", jax.nn.relu(dots), weight)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_and_gradients_in_bfloat16(implementation):
    case = SCORED["tile"]
    args = cases.arguments(case, jnp.bfloat16)[:3]
    g = cotangent(case)
    exact = scores_and_gradients(reference.index_scores, *(x.astype(jnp.float32) for x in args), g)
    rounded = scores_and_gradients(in_bf16, *args, g.astype(jnp.bfloat16))
    for key, value in scores_and_gradients(of(implementation), *args, g).items():
        error, allowed = (
            float(jnp.abs(x[key].astype(jnp.float32) - exact[key]).max())
            for x in ({key: value}, rounded)
        )
        assert error <= 2 * allowed, (key, error, allowed)
        assert allowed > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_through_the_chain_of_bf16(implementation):
    args = cases.arguments(SCORED["odd"], jnp.bfloat16)[:3]
    args = tuple(jnp.round(8 * x) / 8 for x in args)
    scores = api.index_scores(*args, chain=True, implementation=implementation)
    wanted = reference.index_scores(*args, chain=True)
    # Summed in another order before the last rounding: the same, or the next bf16 number.
    np.testing.assert_allclose(scores, wanted, rtol=2.0**-7, atol=0)
    assert np.mean(np.asarray(scores) == np.asarray(wanted)) > 0.99
    np.testing.assert_array_equal(scores, scores.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("chain", [False, True])
def test_dense_scores_a_tile_of_keys_at_a_time(chain, monkeypatch):
    monkeypatch.setattr(xla, "DOTS", 2 * 20 * 4 * 70)
    args, g = cases.arguments(SCORED["tile"])[:3], cotangent(SCORED["tile"])
    tiled = functools.partial(xla.index_scores, chain=chain)
    wanted = functools.partial(reference.index_scores, chain=chain)
    np.testing.assert_allclose(tiled(*args), wanted(*args), rtol=1e-5, atol=1e-5)
    gradients = zip(
        xla.index_scores_gradient(*args, g, chain=chain),
        reference.index_scores_gradient(*args, g, chain=chain),
        strict=True,
    )
    for value, expected in gradients:
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "at"))
def test_gradients_through_the_chain_ignore_the_rounding(implementation):
    """As of scores whose rounded dots are constants plus what passes straight through."""
    case = SCORED["odd"]
    q, weight, keys = cases.arguments(case)[:3]
    g = cotangent(case)

    def straight(q, weight, keys):
        def through(x):
            return x + jax.lax.stop_gradient(reference._bf16(x) - x)

        dots = through(jnp.einsum("btiz,bcz->btic", q, keys))
        terms = through(jax.nn.relu(dots) * weight[..., None])
        return through(terms.sum(2))

    def tested(q, weight, keys):
        if implementation != "at":
            return api.index_scores(q, weight, keys, chain=True, implementation=implementation)
        every = jnp.arange(case.entries)[None, None]
        every = jnp.broadcast_to(every, g.shape)
        return api.index_scores_at(q, weight, keys, every, chain=True)

    wanted = scores_and_gradients(straight, q, weight, keys, g)
    found = scores_and_gradients(tested, q, weight, keys, g)
    for key in ("dq", "dweight", "dkeys"):
        scale = float(jnp.abs(wanted[key]).max())
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("block", [1 << 24, 1])
def test_scores_at_given_entries(block, monkeypatch):
    monkeypatch.setattr("v4jax.kernels.indexer_topk.chosen_scores.BLOCK", block)
    case = SCORED["tile"]
    args = cases.arguments(case)[:3]
    shape = (case.batch, case.length, 11)
    chosen = jax.random.randint(jax.random.key(6), shape, -3, case.entries)
    chosen = jnp.maximum(chosen, -1)
    g = jax.random.normal(jax.random.key(7), shape)

    def dense(*args):
        scores = reference.index_scores(*args)
        taken = jnp.take_along_axis(scores, jnp.maximum(chosen, 0), axis=-1)
        return jnp.where(chosen < 0, 0.0, taken)

    def sparse(*args):
        return api.index_scores_at(*args, chosen)

    wanted = scores_and_gradients(dense, *args, g)
    assert np.any(chosen == -1)
    for key, value in scores_and_gradients(sparse, *args, g).items():
        scale = float(jnp.abs(wanted[key]).max())
        np.testing.assert_allclose(value, wanted[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


def test_scores_at_given_entries_keep_no_dense_array():
    case = cases.Case(length=256, entries=4096, topk=0, batch=1, heads=4, width=16)
    args = cases.arguments(case)[:3]
    chosen = jnp.zeros((1, case.length, 8), jnp.int32)

    def loss(*args):
        return api.index_scores_at(*args, chosen).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * case.length * case.entries


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
