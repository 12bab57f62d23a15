"""Tiles of stored weights in registers, expanded to the type they are multiplied in.

A tile is [columns, depth] if `transposed` (x w^T) and [depth, columns] if not (x w).
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from v4jax.kernels.grouped_matmul import formats

FP8 = 128
FP4 = 32
PACKED = FP4 // 2  # bytes that share a scale


def arrays(weight) -> list[jax.Array]:
    """The arrays that hold [E, out, in]."""
    kind = formats.kind(weight)
    if kind == "float":
        return [weight]
    if kind == "fp8":
        return [weight.values, formats.float_scales(weight)]
    return [weight.values, weight.scales]


def tile(refs, kind, expert, rows, column, width, dtype):
    """The weight's `rows` (a vector of indices) and `width` columns from tile `column` on.

    Indices past the end give the last element's neighbours or zero; the caller multiplies them by
    zero or does not store what comes of them.
    """
    _, height, _ = refs[0].shape
    rows = jnp.minimum(rows, height - 1)
    if kind == "float":
        return _block(refs[0], expert, rows, column, width).astype(dtype)
    if kind == "fp8":
        values = _block(refs[0], expert, rows, column, width).astype(jnp.float32)
        scales = plt.load(refs[1].at[expert, rows // FP8, column * width // FP8])
        return (values * scales[:, None]).astype(dtype)
    codes = _block(refs[0], expert, rows, column, width // 2)
    scales = _block(refs[1], expert, rows, column, width // FP4)
    return _expand_fp4(codes, scales, dtype)


def dot(x, y, trans_b, interpret):
    """x times y or its transpose, accumulated in float32; float32 in three passes of TF32."""
    precision = None
    if x.dtype == jnp.float32:
        three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if interpret else three
    return plt.dot(x, y, trans_b=trans_b, precision=precision)


def _block(ref, expert, rows, column, width):
    """Elements of `width` columns; zero past the array's last."""
    columns = column * width + jnp.arange(width)
    at = ref.at[expert, rows[:, None], columns[None, :]]
    total = ref.shape[2]
    if total % width == 0:
        return plt.load(at)
    mask = jnp.broadcast_to((columns < total)[None, :], (rows.shape[0], width))
    return plt.load(at, mask=mask, other=jnp.zeros((), ref.dtype))


def _expand_fp4(codes, scales, dtype):
    """Packed codes [r, n] and E8M0 bytes [r, n / 16] to the [r, 2 n] that they stand for."""
    rows, packed = codes.shape
    scales = jnp.broadcast_to(_twice_scales(scales)[:, :, None], (*scales.shape, PACKED))
    scales = scales.reshape(rows, packed)
    codes = codes.astype(jnp.int32)
    even = (_half_decoded(codes & 15) * scales).astype(dtype)
    odd = (_half_decoded(codes >> 4) * scales).astype(dtype)
    return jnp.stack([even, odd], axis=-1).reshape(rows, 2 * packed)


def _half_decoded(codes):
    """Half the value of E2M1 codes (int32), float32; half, so that the scale can be twice its own.

    With the exponent's bias in place the codes 0 and 1 would be 0.5 and 0.75 instead of 0 and 0.5;
    2 v - 1 repairs these two and is no smaller than v for the others. Here all of it halved.
    """
    bits = ((codes & 7) << 22) + (125 << 23)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    value = jnp.minimum(value, 2 * value - 0.5)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) | ((codes & 8) << 28)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _twice_scales(scales):
    """float32 2^(byte - 126) of E8M0 bytes: no subnormal for byte 0, and the largest for 254."""
    exponent = scales.astype(jnp.int32)
    bits = jnp.where(exponent == 255, 0x7FC00000, jnp.minimum(exponent + 1, 254) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
