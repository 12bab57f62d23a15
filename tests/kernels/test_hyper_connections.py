"""mHC: every implementation against the reference and numpy loops, and what Sinkhorn promises."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from tests.support.selection import first
from v4jax.kernels.hyper_connections import api, cases, refusals

KERNELS = ("xla", "pallas_tpu", "pallas_gpu")


def numpy_pre(h, fn, base, scale, iterations, eps, rms_eps):
    m = h.shape[0]
    v = h.reshape(-1).astype(np.float64)
    mix = fn.astype(np.float64) @ v / np.sqrt(np.mean(v * v) + rms_eps)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    pre = sigmoid(mix[:m] * scale[0] + base[:m]) + eps
    post = 2 * sigmoid(mix[m : 2 * m] * scale[1] + base[m : 2 * m])
    a = (mix[2 * m :] * scale[2] + base[2 * m :]).reshape(m, m)
    a = np.exp(a - a.max(1, keepdims=True))
    a = a / a.sum(1, keepdims=True) + eps
    a = a / (a.sum(0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(1, keepdims=True) + eps)
        a = a / (a.sum(0, keepdims=True) + eps)
    return pre @ h, post, a


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("m", [2, 4, 8])
def test_against_numpy(m, implementation):
    rng = np.random.default_rng(m)
    d, rows = 12, (2 + m) * m
    h = rng.normal(size=(2, 3, m, d)).astype(np.float32)
    fn = rng.normal(size=(rows, m * d)).astype(np.float32)
    base, scale = rng.normal(size=rows).astype(np.float32), np.array([1, 0.5, 2], np.float32)
    options = {"iterations": 20, "eps": 1e-6, "rms_eps": 1e-6}
    arrays = [jnp.asarray(x) for x in (h, fn, base, scale)]
    pre = functools.partial(api.pre, **options, implementation=implementation)
    u, post, comb = map(np.asarray, jax.jit(pre)(*arrays))
    y = rng.normal(size=(2, 3, d)).astype(np.float32)
    new = jax.jit(functools.partial(api.post, implementation=implementation))
    new = np.asarray(new(y, arrays[0], post, comb))
    for b in range(2):
        for t in range(3):
            wanted = numpy_pre(h[b, t], fn, base, scale, **options)
            np.testing.assert_allclose(u[b, t], wanted[0], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(post[b, t], wanted[1], atol=1e-5)
            np.testing.assert_allclose(comb[b, t], wanted[2], atol=1e-5)
            streams = wanted[1][:, None] * y[b, t] + wanted[2].T @ h[b, t]
            np.testing.assert_allclose(new[b, t], streams, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_matrix_is_doubly_stochastic(implementation):
    h = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
    fn = 0.1 * jax.random.normal(jax.random.key(1), (24, 32))
    options = {"iterations": 20, "eps": 1e-6, "rms_eps": 1e-6, "implementation": implementation}
    pre = jax.jit(functools.partial(api.pre, **options))
    comb = np.asarray(pre(h, fn, jnp.zeros(24), jnp.ones(3))[2])
    np.testing.assert_allclose(comb.sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(comb.sum(-2), 1, atol=1e-4)


@functools.cache
def arrays(case, op, dtype):
    """The arguments of `op`, and a cotangent for each of its results."""
    rng = np.random.default_rng(len(case.name))
    (b, t, m, d), x = case.shape, case.rows

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    y, h = draw(b, t, d).astype(dtype), draw(b, t, m, d).astype(dtype)
    mixing = 1 + draw(b, t, m), draw(b, t, m, m) / m
    # A wide spread of logits, so that Sinkhorn has something to do.
    weights = draw(x, m * d) / np.sqrt(m * d), 2 * draw(x), jnp.array([1.0, 0.5, 2.0])
    outer = draw(b, t, m, d).astype(dtype)
    inner = draw(b, t, d).astype(dtype), draw(b, t, m), draw(b, t, m, m)
    if op == "pre":
        return (h, *weights), inner
    if op == "post":
        return (y, h, *mixing), outer
    return (y, h, *mixing, *weights), (outer, *inner)


def results(case, op, implementation, arguments, cotangents, dtype):
    """Every result of `op` and every gradient, as a flat list of float32 numpy arrays."""
    options = {"dtype": dtype, "implementation": implementation}
    options |= {} if op == "post" else case.options
    function = differentiated_op(op, tuple(options.items()))
    return in_float32(function(arguments, cotangents))


@functools.cache
def differentiated_op(op, options):
    """One program for all tests with these options and shapes."""
    return differentiated(functools.partial(getattr(api, op), **dict(options)))


def differentiated(f):
    @jax.jit
    def run(arguments, cotangents):
        out, vjp = jax.vjp(f, *arguments)
        return out, vjp(cotangents)

    return run


def in_float32(tree):
    return [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)]


@functools.cache
def wanted(case, op, dtype):
    """The reference on the numbers that `dtype` holds: all in float32, and rounding to `dtype`."""
    arguments, cotangents = arrays(case, op, dtype)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangents))
    exact = results(case, op, "reference", *full, "float32")
    if dtype == "float32":
        return exact, exact
    return exact, results(case, op, "reference", arguments, cotangents, dtype)


def close(got, exact, allowed=0.0):
    """Within 1e-5 of the largest, or what is allowed instead if that is more."""
    for k, (x, y) in enumerate(zip(got, exact, strict=True)):
        slack = max(1e-5 * max(1.0, np.abs(y).max()), allowed[k] if allowed else 0.0)
        assert np.abs(x - y).max() <= slack, (k, np.abs(x - y).max(), slack)


# The seam runs the code of both its halves; they alone, with their own gradients, on fewer shapes.
FLOAT32 = [("post_pre", case) for case in cases.NUMERICS] + [
    (op, case) for op in ("pre", "post") for case in (cases.ODD, cases.MANY_TILES)
]
BFLOAT16 = [(op, cases.ODD) for op in ("pre", "post", "post_pre")] + [("post_pre", cases.EIGHT)]
# The Pallas kernels' quick ones: each operation, many tiles.
QUICK = [
    *((op, cases.ODD) for op in ("pre", "post", "post_pre")),
    ("post_pre", cases.MANY_TILES),
]


def sweep(rows, quick):
    """Every row for every implementation; of the Pallas kernels' the `quick` ones go first."""
    rows = [(*row, implementation) for row in rows for implementation in KERNELS]
    return first([row for row in rows if row[2] == "xla" or row[:2] in quick], rows)


def label(x):
    return x.name if isinstance(x, cases.Case) else x


@pytest.mark.parametrize("op, case, implementation", sweep(FLOAT32, QUICK), ids=label)
def test_float32(op, case, implementation):
    got = results(case, op, implementation, *arrays(case, op, "float32"), "float32")
    close(got, wanted(case, op, "float32")[0])


@pytest.mark.parametrize(
    "op, case, implementation", sweep(BFLOAT16, [("post_pre", cases.ODD)]), ids=label
)
def test_bfloat16(op, case, implementation):
    """Within twice the rounding that the reference itself does to bfloat16 arrays."""
    got = results(case, op, implementation, *arrays(case, op, "bfloat16"), "bfloat16")
    exact, rounding = wanted(case, op, "bfloat16")
    allowed = [2 * np.abs(x - y).max() for x, y in zip(rounding, exact, strict=True)]
    close(got, exact, allowed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seam_is_post_then_pre(dtype):
    """Without a kernel not one bit differs, in the results and in the gradients."""
    case = cases.ODD
    arguments, cotangents = arrays(case, "post_pre", dtype)

    def apart(*a):
        new = api.post(*a[:4], dtype=dtype, implementation="xla")
        return new, *api.pre(new, *a[4:], **case.options, dtype=dtype, implementation="xla")

    got = results(case, "post_pre", "xla", arguments, cotangents, dtype)
    for x, y in zip(got, in_float32(differentiated(apart)(arguments, cotangents)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", KERNELS)
def test_tokens_do_not_mix(implementation):
    """A token's gradient reaches its own streams alone, whatever tile it shares."""
    case = cases.ODD
    (h, *weights), _ = arrays(case, "pre", "float32")

    def one(h):
        u, _, _ = api.pre(h, *weights, **case.options, implementation=implementation)
        return u[1, 2].sum()

    touched = np.abs(jax.jit(jax.grad(one))(h)).sum((-1, -2)) > 0
    assert touched.sum() == 1 and touched[1, 2]


@pytest.mark.parametrize("implementation", KERNELS)
def test_extreme_logits(implementation):
    """A matrix whose softmax underflows stays finite, forward and backward."""
    case = cases.ODD
    (h, fn, base, scale), cotangents = arrays(case, "pre", "float32")
    arguments = h, fn, 40 * base, scale
    got = results(case, "pre", implementation, arguments, cotangents, "float32")
    exact = results(case, "pre", "reference", arguments, cotangents, "float32")
    assert all(np.isfinite(x).all() for x in got)
    close(got[:3], exact[:3])


@pytest.mark.parametrize("implementation", KERNELS)
def test_streams_of_zeros(implementation):
    """Tokens whose streams are all zero among others: what rms_eps is for."""
    case = cases.ODD
    (h, *weights), cotangents = arrays(case, "pre", "float32")
    arguments = h.at[:, 1::2].set(0), *weights
    got = results(case, "pre", implementation, arguments, cotangents, "float32")
    close(got, results(case, "pre", "reference", arguments, cotangents, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@hypothesis.given(data=strategies.data())
@hypothesis.settings(max_examples=6, deadline=None)
def test_any_sizes(implementation, data):
    """As many streams as a kernel takes, epsilons that count, sizes that no tile divides."""
    streams = (1, 2, 4, 8) if implementation == "pallas_gpu" else range(1, 9)
    batch, length, channels = (data.draw(strategies.integers(1, n)) for n in (3, 140, 40))
    m = data.draw(strategies.sampled_from(streams))
    rounds = data.draw(strategies.integers(1, 4))
    eps = data.draw(strategies.sampled_from([1e-6, 1e-2]))
    case = cases.Case("drawn", batch, length, m, channels, rounds, eps=eps, rms_eps=eps)
    arguments, cotangents = arrays(case, "post_pre", "float32")
    got = results(case, "post_pre", implementation, arguments, cotangents, "float32")
    close(got, wanted(case, "post_pre", "float32")[0])


def test_refusals():
    streams = jax.ShapeDtypeStruct((1, 1, 3, 64), jnp.bfloat16)
    assert "M = 3" in refusals.refusal("pre", "pallas_gpu", streams, "bfloat16")
    assert refusals.refusal("pre", "pallas_tpu", streams, "bfloat16") is None
    half = jax.ShapeDtypeStruct((1, 1, 4, 64), jnp.float16)
    assert "float16" in refusals.refusal("post", "pallas_tpu", half, "float32")
    huge = jax.ShapeDtypeStruct((1, 1, 8, 1 << 17), jnp.float32)
    reason = refusals.refusal("post_backward", "pallas_tpu", huge, "float32")
    assert "need 904 MiB of VMEM and v5p has 62 MiB" in reason
    h = jnp.zeros((1, 2, 4, 16), jnp.float16)
    weights = jnp.zeros((24, 64)), jnp.zeros(24), jnp.ones(3)
    options = {"iterations": 2, "eps": 1e-6, "rms_eps": 1e-6}
    with pytest.raises(NotImplementedError, match="the streams are float16"):
        api.pre(h, *weights, **options, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="no implementation 'cudnn'"):
        api.pre(h, *weights, **options, implementation="cudnn")
