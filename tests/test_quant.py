"""quant.py against ml_dtypes and a small numpy version, bit for bit, and the golden checkpoint."""

import functools
import json
import math
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from tests.support.tiny import tiny_config
from v4jax import quant
from v4jax.kernels.sparse_attention import stored
from v4jax.model.transformer import Output, Transformer

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden" / "native"
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3, E2M1, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu
SMALLEST_NORMAL = 2.0**-126
# Compiled: eager operations are compiled one by one, and one test of them is enough.
fake_quant_e4m3 = jax.jit(quant.fake_quant_e4m3, static_argnums=1)
fake_quant_e2m1 = jax.jit(quant.fake_quant_e2m1, static_argnums=1)
pow2_ceil = jax.jit(quant.pow2_ceil)
hadamard = jax.jit(quant.hadamard)
e8m0_to_float = jax.jit(quant.e8m0_to_float)
quick = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def strict_numpy():
    # The oracles overflow and cast NaN where that is the right answer.
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        yield


def assert_same_bits(actual, expected):
    """Equal shape, type and bits, so that -0 differs from 0; any NaN equals any other."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    actual, expected = actual.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(actual, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual)[number], np.signbit(expected)[number])


def flushed(x):
    """Subnormals as XLA computes with them on a CPU: zeros of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def numpy_pow2_ceil(x):
    """From frexp in float64, where x / 448 and x / 6 are exact enough to keep their side of 2^k."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(1.0, exponent - (mantissa == 0.5)).astype(np.float32)


def numpy_fake_quant(x, group, dtype, largest, least_amax):
    out = np.empty_like(x, np.float32)
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group].astype(np.float32)
        amax = np.abs(part).max(-1, keepdims=True).astype(np.float64)
        scale = numpy_pow2_ceil(np.maximum(amax, np.float32(least_amax)) / largest)
        out[..., start : start + group] = (part / scale).astype(dtype).astype(np.float32) * scale
    return out.astype(x.dtype)


numpy_e4m3 = functools.partial(
    numpy_fake_quant, dtype=E4M3, largest=448, least_amax=np.float32(1e-4)
)
numpy_e2m1 = functools.partial(
    numpy_fake_quant, dtype=E2M1, largest=6, least_amax=6 * SMALLEST_NORMAL
)
BOTH = pytest.mark.parametrize(
    ("fake_quant", "oracle"),
    [(fake_quant_e4m3, numpy_e4m3), (fake_quant_e2m1, numpy_e2m1)],
    ids=["e4m3", "e2m1"],
)


def numpy_dequantize(values, scales):
    """Through ml_dtypes, one loop a block; float64 inside, so the product is exact."""
    if values.dtype == np.uint8:
        codes = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
        values, rows, columns = codes.view(E2M1).astype(np.float64), 1, 32
    else:
        values, rows, columns = values.astype(np.float64), 128, 128
    if scales.dtype == np.uint8:
        scales = scales.view(E8M0)
    out = np.empty(values.shape)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            cell = np.s_[..., i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            out[cell] = values[cell] * scales[..., i, None, j, None].astype(np.float64)
    return out


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


# Decoding: every code.


def test_every_e8m0_byte():
    codes = np.arange(256, dtype=np.uint8)
    decoded = np.asarray(e8m0_to_float(codes))
    np.testing.assert_array_equal(decoded.view(np.uint32)[0], np.float32(2.0**-127).view(np.uint32))
    assert np.isnan(decoded[255])
    assert_same_bits(decoded, codes.view(E8M0).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_fp4_byte(dtype):
    packed = np.arange(256, dtype=np.uint8).reshape(2, 4, 32)
    signed = np.concatenate([E2M1_VALUES, -E2M1_VALUES])
    expected = np.stack([signed[packed & 15], signed[packed >> 4]], -1).reshape(2, 4, 64)
    unpacked = jax.jit(functools.partial(quant.fp4_unpack, dtype=dtype))(packed)
    assert_same_bits(unpacked, expected.astype(dtype))
    np.testing.assert_array_equal(jax.jit(quant.fp4_pack)(unpacked), packed)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_every_code_with_every_scale_byte(kind, dtype):
    """Exact wherever the product is normal, and re-encoded to the same byte."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.arange(256, dtype=np.uint8)
    if kind == "fp8":
        q = quant.QTensor(codes[:, None, :].view(E4M3), np.repeat(scales, 2).reshape(256, 1, 2))
        encode = quant.quantize_fp8
    else:
        q = quant.QTensor(codes[:, None, :], np.repeat(scales, 16).reshape(256, 1, 16))
        encode = quant.quantize_fp4
    decoded = quant.dequantize(q, dtype)
    expected = flushed(numpy_dequantize(q.values, q.scales).astype(np.float32))
    assert_same_bits(decoded, expected.astype(dtype))
    encoded = encode(decoded, q.scales)
    stored = numpy_dequantize(q.values, np.full_like(q.scales, 127))
    again = numpy_dequantize(np.asarray(encoded.values), np.full_like(q.scales, 127))
    exact = np.isfinite(expected) & ((expected != 0) | (stored == 0))
    assert exact.mean() > 0.9
    assert_same_bits(again[exact], stored[exact])


@pytest.mark.parametrize("shape", [(3, 5), (128, 128), (2, 130, 257), (1, 300, 64)])
@pytest.mark.parametrize("scale_dtype", ["e8m0", "float32"])
def test_fp8_blocks_at_any_size(shape, scale_dtype):
    w = np.ldexp(normal(0, *shape), np.arange(shape[-1]) % 20 - 10)
    q = quant.quantize_fp8(w, None, scale_dtype)
    blocks = tuple(math.ceil(size / 128) for size in shape[-2:])
    assert q.scales.shape == (*shape[:-2], *blocks)
    assert (q.kind, q.shape, q.ndim, q.block) == ("fp8", shape, len(shape), (128, 128))
    exact = numpy_dequantize(np.asarray(q.values), np.asarray(q.scales)).astype(np.float32)
    decoded = quant.dequantize(q, jnp.float32)
    assert_same_bits(decoded, exact)
    again = quant.quantize_fp8(decoded, q.scales)
    np.testing.assert_array_equal(again.values.view(np.uint8), q.values.view(np.uint8))
    # Half a step of the E4M3 grid: 2^-4 of the value, 2^-10 of the scale near zero.
    step = np.abs(w) / 16 + np.abs(w).max((-2, -1), keepdims=True) * 2.0**-17
    assert (np.abs(exact - w) <= step).all()


def test_fresh_scales_follow_the_specification():
    w = normal(1, 256, 256) * np.repeat(np.float32([1e-7, 1]), 128)[:, None]
    for q, rows, columns, largest, least in [
        (quant.quantize_fp8(w), 128, 128, 448, np.float32(1e-4)),
        (quant.quantize_fp4(w), 1, 32, 6, np.float32(6 * SMALLEST_NORMAL)),
    ]:
        amax = np.abs(w).reshape(256 // rows, rows, 256 // columns, columns).max((1, 3))
        scale = numpy_pow2_ceil(np.maximum(amax, least).astype(np.float64) / largest)
        assert_same_bits(e8m0_to_float(q.scales), scale)
        wide = np.repeat(np.repeat(scale, rows, 0), columns, 1)
        on_grid = (w / wide).astype(E4M3 if q.kind == "fp8" else E2M1).astype(np.float32)
        assert_same_bits(quant.dequantize(q, jnp.float32), on_grid * wide)


# Rounding.


def test_ties_go_to_even():
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    even = np.float32([0, 1, 1, 2, 2, 4, 4, 6])
    expected = np.float32([*even, *-even])
    assert_same_bits(fake_quant_e2m1(np.concatenate([ties, -ties]), 16), expected)
    ties = np.float32([2**-10, 3 * 2**-10, 1.0625, 1.1875, 17, 19, 432, 448])
    even = np.float32([0, 2**-8, 1, 1.25, 16, 20, 448, 448])
    expected = np.float32([*even, *-even])
    assert_same_bits(fake_quant_e4m3(np.concatenate([ties, -ties]), 16), expected)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fake_quant_rounds_as_ml_dtypes(fake_quant, oracle, dtype):
    """Around every midpoint of the grid, where a cast by way of float16 would round twice."""
    dense = np.unique(np.arange(128, dtype=np.uint8).view(E4M3).astype(np.float32)[:127])
    if oracle is numpy_e2m1:
        dense = E2M1_VALUES
    middle = (dense[1:] + dense[:-1]) / 2
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))]
    x = np.concatenate([*near, middle * (1 + 2**-13), middle * (1 - 2**-13), dense])
    x = np.concatenate([x, -x]).astype(np.float32)
    # A leading column of the largest value holds each row's scale at 1.
    x = np.stack([np.full_like(x, dense[-1]), x], -1).astype(dtype)
    assert_same_bits(fake_quant(x, 2), oracle(x, 2))


@BOTH
@pytest.mark.parametrize(
    ("group", "dtype"),
    [(1, np.float32), (7, ml_dtypes.bfloat16), (64, np.float32), (300, ml_dtypes.bfloat16)],
)
def test_fake_quant_groups_and_the_partial_last(fake_quant, oracle, group, dtype):
    x = (normal(2, 3, 5, 200) * np.exp2(np.linspace(-60, 60, 200))).astype(dtype)
    assert_same_bits(fake_quant(x, group), oracle(x, group))


@BOTH
@pytest.mark.parametrize(
    "magnitude",
    [0.0, SMALLEST_NORMAL, 1e-37, 1e-30, 9.99e-5, 1e-4, 448.0, 6.0, 3e38, 3.4028235e38],
)
def test_fake_quant_of_extremes(fake_quant, oracle, magnitude):
    x = np.float32(magnitude) * np.float32([1, -1, 0.5, -0.0, 0.3, -0.7, 1e-3, 0])
    x = flushed(x).astype(np.float32)
    assert_same_bits(fake_quant(x, 8), flushed(oracle(x, 8)))


@BOTH
def test_fake_quant_hides_no_inf_or_nan(fake_quant, oracle):
    x = np.float32([[1, np.inf, 2, -3], [1, np.nan, 2, -3], [1, -np.inf, np.nan, 4], [1, 1, 1, 1]])
    out = np.asarray(fake_quant(x, 4))
    np.testing.assert_array_equal(out[~np.isfinite(x)], x[~np.isfinite(x)])
    assert_same_bits(out[3], oracle(x[3], 4))


@BOTH
def test_scale_changes_just_above_its_power_of_two(fake_quant, oracle):
    """amax = largest * 2^k keeps scale 2^k; the next float doubles it."""
    edges = np.float32(448 if oracle is numpy_e4m3 else 6) * np.exp2(
        np.arange(-13, 100, dtype=np.float32)
    )
    around = [edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(0))]
    amax = np.concatenate(around)
    x = np.stack([amax, amax * np.float32(0.123), amax * np.float32(-0.77)], -1)
    assert_same_bits(fake_quant(x, 3), oracle(x, 3))


@BOTH
@quick
@hypothesis.given(
    x=hnp.arrays(np.float32, (2, 6), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    shift=st.integers(-20, 20),
)
def test_fake_quant_properties(fake_quant, oracle, x, shift):
    x = flushed(x)
    once = np.asarray(fake_quant(x, 4))
    assert_same_bits(once, flushed(oracle(x, 4)))
    assert_same_bits(fake_quant(-x, 4), -once)
    # Rounding what is rounded changes nothing, though its scale may be smaller.
    assert_same_bits(fake_quant(once, 4), once)
    scaled = np.ldexp(x, shift)
    if oracle is numpy_e2m1 and np.abs(scaled[x != 0]).min(initial=1) > 1e-30:
        assert_same_bits(fake_quant(scaled, 4), np.ldexp(once, shift))


@quick
@hypothesis.given(x=st.floats(SMALLEST_NORMAL, 2.0**127, width=32))
def test_pow2_ceil(x):
    x = np.float32(x)
    power = float(pow2_ceil(x))
    assert math.frexp(power)[0] == 0.5
    assert power / 2 < x <= power


def test_pow2_ceil_at_the_edges():
    x = np.float32([0, SMALLEST_NORMAL, 1, 1 + 2**-23, 1 - 2**-24, 2.0**127, 3e38])
    expected = np.float32([0, SMALLEST_NORMAL, 1, 2, 1, 2.0**127, np.inf])
    assert_same_bits(pow2_ceil(x), expected)
    assert_same_bits(pow2_ceil(np.float32([np.inf, np.nan, -np.nan])), [np.float32(np.inf)] * 3)


@BOTH
def test_fake_quant_gradient_is_the_identity(fake_quant, oracle):
    x, weight = jnp.asarray(normal(3, 4, 20)), jnp.asarray(normal(4, 4, 20))
    gradient = jax.jit(jax.grad(lambda x: (fake_quant(x, 8) * weight).sum()))(x)
    assert_same_bits(gradient, weight)
    primal, tangent = jax.jvp(lambda x: fake_quant(x, 8), (x,), (weight,))
    assert_same_bits(primal, oracle(np.asarray(x), 8))
    assert_same_bits(tangent, weight)
    half = jax.grad(lambda x: fake_quant(x, 8).sum().astype(jnp.float32))(x.astype(jnp.bfloat16))
    assert_same_bits(half, np.ones((4, 20), ml_dtypes.bfloat16))


# Packing and re-encoding.


@quick
@hypothesis.given(
    values=hnp.arrays(np.uint8, (2, 32)),
    scales=hnp.arrays(np.uint8, (2, 2), elements=st.integers(2, 252)),
)
def test_fp4_round_trip_is_byte_exact(values, scales):
    """With the stored scales, code 8 (-0) included; through bfloat16 as well."""
    for dtype in (jnp.float32, jnp.bfloat16):
        again = quant.quantize_fp4(quant.dequantize(quant.QTensor(values, scales), dtype), scales)
        np.testing.assert_array_equal(again.values, values)
        np.testing.assert_array_equal(again.scales, scales)


def test_fp4_pack_rounds_clips_and_puts_the_low_nibble_first():
    packed = jax.jit(quant.fp4_pack)(
        np.float32([[1, -1.5, 0.0, -0.0, 100, -7], [0.3, -0.2, 5, 5.1, 3, 2]])
    )
    assert packed.tolist() == [[0xB2, 0x80, 0xF7], [0x81, 0x76, 0x45]]


def test_given_scales_clip():
    ones = np.full((1, 1), 127, np.uint8)
    values = quant.quantize_fp8(np.float32([[1e6, -1e6, 500, 449, -0.0]]), ones).values
    assert_same_bits(values, np.float32([[448, -448, 448, 448, -0.0]]).astype(E4M3))
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = [1e6, -1e6, 6.1, -0.0]
    np.testing.assert_array_equal(quant.quantize_fp4(w, ones).values[0, :2], [0xF7, 0x87])


def test_qtensor_is_a_pytree_that_slices():
    w = normal(5, 3, 2, 64, 96)
    for q in (quant.quantize_fp8(w), quant.quantize_fp4(w)):
        whole = quant.dequantize(q, jnp.float32)
        assert (q.shape, q.ndim) == (w.shape, 4)
        part = jax.tree.map(lambda leaf: leaf[1, 0], q)
        assert part.shape == (64, 96)
        assert_same_bits(quant.dequantize(part, jnp.float32), whole[1, 0])
        abstract = jax.eval_shape(lambda q: q, q)
        assert (abstract.kind, abstract.shape, abstract.block) == (q.kind, q.shape, q.block)
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
        assert names == [".values", ".scales"]
        _, scanned = jax.lax.scan(lambda carry, layer: (carry, layer.dequantize()), 0, q)
        assert_same_bits(scanned, whole)


def test_jit_and_eager_fake_quant_agree():
    x = normal(6, 130, 160)
    assert_same_bits(quant.fake_quant_e2m1(x, 32), fake_quant_e2m1(x, 32))


def test_round_to_survives_widening():
    x = normal(7, 1000)
    rounded = jax.jit(lambda x: quant.round_to(x * 3, jnp.bfloat16).astype(jnp.float32) * 5)(x)
    expected = (x * np.float32(3)).astype(ml_dtypes.bfloat16).astype(np.float32) * np.float32(5)
    assert_same_bits(rounded, expected)
    assert_same_bits(quant.round_to(jnp.asarray(x), jnp.float32), x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quant.quantize_fp4(np.ones((2, 33), np.float32)), "divisible by 32"),
        (lambda: quant.quantize_fp8(np.ones((2, 3), np.float32), scale_dtype="bf16"), "bf16"),
        (
            lambda: quant.quantize_fp8(np.ones((2, 129), np.float32), np.ones((1, 1), np.uint8)),
            r"needs uint8 or float32 \(1, 2\)",
        ),
        (
            lambda: quant.quantize_fp4(np.ones((2, 32), np.float32), np.ones((2, 1), np.float32)),
            "scales are float32",
        ),
        (lambda: quant.fp4_unpack(np.ones(2, np.int8)), "int8"),
        (lambda: quant.fp4_unpack(np.ones(2, np.uint8), jnp.float16), "float16"),
        (lambda: quant.fp4_pack(np.ones(3, np.float32)), "odd"),
        (lambda: quant.hadamard(np.ones(12, np.float32)), "power of two; the last axis is 12"),
        (lambda: quant.QTensor(np.ones(3, np.float32), None).kind, "float32"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Hadamard.


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard_is_the_sylvester_matrix(n):
    """Entry (i, j) is (-1)^popcount(i & j)."""
    index = np.arange(n)
    signs = 1 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)
    x = normal(7, 3, 5, n)
    # 4e-6: some ten float32 roundings in a sum of 128 terms.
    np.testing.assert_allclose(hadamard(x), x @ signs * n**-0.5, rtol=0, atol=4e-6)
    np.testing.assert_allclose(hadamard(hadamard(x)), x, rtol=0, atol=1e-5)


def test_hadamard_of_bfloat16_rounds_once():
    """Small integers add exactly, so one rounding of the float64 result is the answer."""
    x = np.random.default_rng(8).integers(-64, 65, (50, 128)).astype(ml_dtypes.bfloat16)
    index = np.arange(128)
    signs = 1 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)
    product = (x.astype(np.float64) @ signs).astype(np.float32) * np.float32(128**-0.5)
    assert_same_bits(hadamard(x), product.astype(ml_dtypes.bfloat16))


# The golden checkpoint.


def golden_tensors():
    """{key: array} of the stored checkpoint, read by hand."""
    dtypes = {"F8_E4M3": E4M3, "F8_E8M0": np.uint8, "I8": np.uint8}
    tensors = {}
    for path in sorted(GOLDEN.glob("model-*.safetensors")):
        blob = path.read_bytes()
        size = int.from_bytes(blob[:8], "little")
        for key, entry in json.loads(blob[8 : 8 + size]).items():
            if entry.get("dtype") in dtypes:
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                array = np.frombuffer(blob[start:end], dtypes[entry["dtype"]])
                tensors[key] = array.reshape(entry["shape"])
    return tensors


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden/native beside the repository")
def test_golden_weights_reencode_byte_for_byte():
    tensors = golden_tensors()
    groups = {}
    for key in tensors:
        if key.endswith(".weight"):
            scales = tensors[key.removesuffix("weight") + "scale"]
            q = quant.QTensor(tensors[key], scales)
            groups.setdefault((q.kind, q.shape), []).append(q)
    assert {kind for kind, _ in groups} == {"fp8", "fp4"}
    for (kind, _), members in groups.items():
        encode = quant.quantize_fp8 if kind == "fp8" else quant.quantize_fp4
        q = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
        decoded = quant.dequantize(q, jnp.bfloat16)
        assert_same_bits(decoded, numpy_dequantize(q.values, q.scales).astype(jnp.bfloat16))
        again = encode(decoded, q.scales)
        np.testing.assert_array_equal(again.values.view(np.uint8), q.values.view(np.uint8))
        np.testing.assert_array_equal(again.scales, q.scales)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden/native beside the repository")
def test_golden_scales_differ_only_where_the_values_do_not():
    """Fresh scales can be smaller than the stored; what they decode to is the same."""
    tensors = golden_tensors()
    key = next(key for key, array in tensors.items() if key.endswith("experts.0.w1.weight"))
    stored = quant.QTensor(tensors[key], tensors[key.replace(".weight", ".scale")])
    decoded = quant.dequantize(stored, jnp.float32)
    fresh = quant.quantize_fp4(decoded)
    assert (np.asarray(fresh.scales) <= stored.scales).all()
    assert_same_bits(quant.dequantize(fresh, jnp.float32), decoded)


def stored_params():
    w = jax.random.normal(jax.random.key(0), (130, 64))
    return {"a": quant.quantize_fp8(w), "b": [quant.quantize_fp4(w)], "c": jnp.ones(3)}


def test_flax_serialization_keeps_stored_weights_byte_for_byte():
    params = stored_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    back = serialization.from_bytes(zeros, serialization.to_bytes(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for found, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert found.dtype == wanted.dtype
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_the_repr_of_stored_weights_is_short():
    params = stored_params()
    assert repr(params["a"]) == "QTensor(values=float8_e4m3fn[130, 64], scales=uint8[2, 1])"
    assert repr(params["b"]) == "[QTensor(values=uint8[130, 32], scales=uint8[130, 2])]"
    # Trees of other things than arrays, as jax makes them.
    shapes = jax.eval_shape(stored_params)
    assert repr(shapes["a"]) == repr(params["a"])
    assert repr(jax.tree.map(lambda x: None, params)["a"]) == "QTensor(values=None, scales=None)"


def test_reprs_of_caches_and_outputs_are_short():
    """One line a layer at most, whatever is in them."""
    rows = stored.pack(jnp.zeros((1, 4, 512), jnp.bfloat16))
    assert repr(rows) == "StoredRows(words=int32[1, 4, 128], tails=int32[1, 32, 128])"
    cache = Transformer(tiny_config()).init_cache(2, 16)
    assert len(repr(cache)) < 1000
    assert repr(cache.layers["layers_0"][0]).startswith("LayerCache(window=float32[1, 2, 23, 24]")
    output = Output(jnp.zeros((2, 3, 4)), cache, aux={"streams": {0: jnp.zeros((2, 3))}})
    shown = "Output(logits=float32[2, 3, 4], cache=Cache(lengths=int32[2], "
    assert repr(output).startswith(shown) and "{'streams': {0: float32[2, 3]}}" in repr(output)
