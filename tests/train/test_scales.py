"""The rule of stored scales: kept while values fit, changed with hysteresis, bytes untouched."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from v4jax import quant
from v4jax.train.optimizer import moved
from v4jax.train.scales import next_scales

few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
follow = jax.jit(next_scales, static_argnums=2)
encode = {"fp4": jax.jit(quant.quantize_fp4), "fp8": jax.jit(quant.quantize_fp8)}
decode = jax.jit(quant.dequantize)
# Of a / s: least, most, the largest value of the grid, and half a step below that.
FP4, FP8 = (2.5, 7.0, 6.0, 1.0), (1.75, 464.0, 448.0, 16.0)
FORMS = {"fp4": (FP4, np.uint8), "fp8": (FP8, np.uint8), "fp8_float": (FP8, np.float32)}
forms = pytest.mark.parametrize("form", FORMS)
GROUPS = (2, 3)  # scales [2, 3]: FP4 [2, 96], FP8 [130, 300] with blocks cut at both edges
SHAPES = {"fp4": (2, 96), "fp8": (130, 300)}


def kind_of(form):
    return form.split("_")[0]


def drawn_scales(draw, form):
    """E8M0 bytes, or float32 scales of any mantissa, of which no product leaves float32."""
    if FORMS[form][1] == np.uint8:
        return draw(hnp.arrays(np.uint8, GROUPS, elements=st.integers(20, 230)))
    return draw(hnp.arrays(np.float32, GROUPS, elements=st.floats(2**-10, 8, width=32)))


def as_float(scales):
    return scales if scales.dtype == np.float32 else np.exp2(scales - np.float32(127))


def stored(draw, form):
    """Any codes, with scales of any size."""
    shape, scales = SHAPES[kind_of(form)], drawn_scales(draw, form)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if form == "fp4":
        codes = rng.choice(draw(st.sampled_from(CODES)), (shape[0], shape[1] // 2))
        return quant.QTensor(codes.astype(np.uint8), scales)
    codes = rng.integers(0, draw(st.sampled_from([1, 9, 60, 127])), shape)
    codes = codes + 128 * rng.integers(0, 2, shape)
    return quant.QTensor(codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn), scales)


# All codes; 6 and -6 alone; nothing above 1; zeros of both signs.
CODES = [range(256), [0x77, 0x7F, 0xF7], [0x00, 0x12, 0x9A, 0x88], [0x00, 0x08, 0x80, 0x88]]


def by_group(form, x):
    """The largest of each group, in numpy."""
    rows, columns = quant.FP4_BLOCK if form == "fp4" else quant.FP8_BLOCK
    edges = [np.arange(0, n, b) for n, b in zip(x.shape, (rows, columns), strict=True)]
    return np.maximum.reduceat(np.maximum.reduceat(x, edges[0], 0), edges[1], 1)


def spread(form, x, shape):
    rows, columns = quant.FP4_BLOCK if form == "fp4" else quant.FP8_BLOCK
    return np.repeat(np.repeat(x, rows, 0), columns, 1)[: shape[0], : shape[1]]


@forms
@hypothesis.given(data=st.data())
@few
def test_what_is_on_the_grid_comes_back_byte_for_byte(form, data):
    q = stored(data.draw, form)
    w = decode(q)
    scales = follow(w, q.scales, kind_of(form))
    again = encode[kind_of(form)](w, scales)
    np.testing.assert_array_equal(scales, q.scales)
    np.testing.assert_array_equal(
        np.asarray(again.values).view(np.uint8), np.asarray(q.values).view(np.uint8)
    )


@forms
@hypothesis.given(data=st.data())
@few
def test_a_small_step_keeps_scales_and_values(form, data):
    """Values as fresh scales leave them, each moved by less than half its step, either way."""
    (_, most, largest, half), _ = FORMS[form]
    q = stored(data.draw, form)
    w = np.array(decode(q))
    s = spread(form, as_float(q.scales), w.shape)
    rows = 1 if form == "fp4" else 128
    w[::rows, ::32] = (largest * s)[::rows, ::32]  # a value at the top of each group
    smallest = 0.25 if form == "fp4" else 2.0**-10
    step = smallest if form == "fp4" else np.maximum(np.abs(w / s) * 2.0**-5, smallest)
    sign = np.random.default_rng(data.draw(st.integers(0, 99))).choice([-1, 1], w.shape)
    near = (w + 0.99 * data.draw(st.floats(0, 1)) * step * s * sign).astype(np.float32)
    assert (np.abs(near) <= most * s).all() and half < largest
    scales = follow(near, q.scales, kind_of(form))
    np.testing.assert_array_equal(scales, q.scales)
    np.testing.assert_array_equal(decode(encode[kind_of(form)](near, scales)), w)


@forms
@hypothesis.given(data=st.data())
@few
def test_the_rule_by_hand(form, data):
    """Growing and shrinking groups of any size, against the rule in float64."""
    (least, most, largest, half), dtype = FORMS[form]
    before = drawn_scales(data.draw, form)
    shape = SHAPES[kind_of(form)]
    ratio = data.draw(hnp.arrays(np.float64, GROUPS, elements=st.floats(-9, 9))) * np.log(2)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = spread(form, np.exp(ratio) * largest * as_float(before), shape)
    w = (rng.uniform(-1, 1, shape) * size).astype(np.float32)
    after = np.asarray(follow(w, before, kind_of(form)))
    assert after.dtype == dtype
    found = (by_group(form, np.abs(w)), as_float(before), as_float(after))
    a, s, t = (x.astype(np.float64) for x in found)
    kept = (a > least * s) & (a <= most * s)
    np.testing.assert_array_equal(after[kept], before[kept])
    factor = np.log2(t / s)
    np.testing.assert_array_equal(factor, np.round(factor))  # powers of two
    bounded = np.maximum(a, 1e-4 if kind_of(form) == "fp8" else 0)[~kept]
    close = 1 + 1e-6  # a float32 scale times 448 is rounded
    assert (bounded <= largest * t[~kept] * close).all()
    assert (bounded * close > largest * t[~kept] / 2).all()
    # Applied again, nothing moves; and no value is farther off than half the top step.
    np.testing.assert_array_equal(follow(w, after, kind_of(form)), after)
    off = np.abs(np.asarray(decode(encode[kind_of(form)](w, after))).astype(np.float64) - w)
    assert (by_group(form, off) <= half * t * close).all()


def test_hysteresis():
    """One FP4 group: doubled above 7, halved at 5; halved at 2.5, doubled above 3.5."""
    byte = np.full((1, 1), 127, np.uint8)
    # A path of the largest value, the other 31 off the grid, and the scale after each step.
    path = [(6, 1), (7, 1), (7.01, 2), (6, 2), (5.01, 2), (5, 1), (2.51, 1), (2.5, 0.5)]
    path += [(2.6, 0.5), (3.5, 0.5), (3.51, 1), (100, 32), (12.01, 4)]
    for amax, scale in path:
        w = np.full((1, 32), 0.3, np.float32)
        w[0, 5] = -amax
        byte = follow(w, byte, "fp4")
        assert float(as_float(np.asarray(byte))[0, 0]) == scale, amax


@pytest.mark.parametrize("amax, scale", [(464, 1), (464.1, 2), (1.76, 1), (1.75, 2**-8)])
@pytest.mark.parametrize("s", [np.float32(1), np.float32(0.7)])
def test_fp8_bounds(amax, scale, s):
    w = np.full((4, 4), 0.0123 * s, np.float32)
    w[1, 2] = np.float32(amax) * s
    found = follow(w, np.full((1, 1), s), "fp8")
    np.testing.assert_array_equal(found, np.full((1, 1), s * np.float32(scale)))


def test_signs_of_zero_outlive_a_change_of_nothing():
    w = jnp.float32([0.0, -0.0, 1.0, -0.0])
    change = jnp.float32([-0.0, 0.0, -0.0, -1.0])
    for add in (moved, jax.jit(moved)):
        found = np.asarray(add(w, change))
        np.testing.assert_array_equal(found, np.float32([0, 0, 1, -1]))
        assert np.signbit(found).tolist() == [False, True, False, True]
    gradient = jax.grad(lambda change: moved(w, change) @ np.float32([1, 2, 3, 4]))(change)
    np.testing.assert_array_equal(gradient, np.float32([1, 2, 3, 4]))


def test_a_group_that_never_held_anything_keeps_its_byte():
    """Byte 0 is 2^-127, which float32 arithmetic flushes."""
    for kind, shape in SHAPES.items():
        byte = np.zeros((2, 3), np.uint8)
        np.testing.assert_array_equal(follow(np.full(shape, -0.0, np.float32), byte, kind), byte)


@functools.cache
def _on_a_mesh():
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs eight devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)


@forms
def test_on_a_mesh_that_cuts_groups_the_scales_are_those_of_one_device(form):
    """96 inputs in 4 parts of 24; 256 x 384 in parts of 128 x 96: no part has whole groups."""
    mesh, kind = _on_a_mesh(), kind_of(form)
    shape = (2, 96) if form == "fp4" else (256, 384)
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q = encode[kind](w) if form != "fp8_float" else quant.quantize_fp8(w, None, "float32")
    near = np.asarray(decode(q)) * np.float32([[1.0], [2.5]] * (shape[0] // 2))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    found = follow(jax.device_put(near, spec), q.scales, kind)
    np.testing.assert_array_equal(found, follow(near, q.scales, kind))
    assert form != "fp4" or np.any(np.asarray(found) != np.asarray(q.scales))
