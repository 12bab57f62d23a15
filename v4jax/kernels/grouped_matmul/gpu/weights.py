"""Tiles of stored weights in registers, expanded to the type they are multiplied in.

A tile is [columns, depth] if `transposed` (x w^T) and [depth, columns] if not (x w).
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from v4jax.kernels.grouped_matmul import formats
from v4jax.kernels.grouped_matmul.operands import Weight

FP8 = 128
FP4 = 32
CODES = 8  # FP4 codes of a word


def arrays(weight) -> Weight:
    """The arrays that hold [E, out, in]."""
    kind = formats.kind(weight)
    if kind == "float":
        return Weight(weight)
    if kind == "fp8":
        return Weight(weight.values, formats.float_scales(weight))
    # Words of four bytes, without a copy: Pallas Triton's offsets would not reach the bytes of
    # Pro's experts, and two codes of a word are decoded at a time.
    values = weight.values.reshape(*weight.values.shape[:-1], -1, 4)
    return Weight(jax.lax.bitcast_convert_type(values, jnp.int32), weight.scales)


def tile(weight: Weight, kind, expert, rows, column, width, dtype):
    """The weight's `rows` (a vector of indices) and `width` columns from tile `column` on.

    Indices past the end give the last element's neighbours or zero; the caller multiplies them by
    zero or does not store what comes of them.
    """
    values, scales = weight
    _, height, _ = values.shape
    rows = jnp.minimum(rows, height - 1)
    if kind == "float":
        return _block(values, expert, rows, column, width).astype(dtype)
    if kind == "fp8":
        values = _block(values, expert, rows, column, width).astype(jnp.float32)
        scales = plt.load(scales.at[expert, rows // FP8, column * width // FP8])
        return (values * scales[:, None]).astype(dtype)
    codes = _block(values, expert, rows, column, width // CODES)
    scales = _block(scales, expert, rows, column, width // FP4)
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


def _expand_fp4(words, scales, dtype):
    """Words of eight codes [r, n] and E8M0 bytes [r, n / 4] to the [r, 8 n] that they stand for."""
    rows, count = words.shape
    shape = (*scales.shape, FP4 // CODES)
    scales = jnp.broadcast_to(_scales(scales)[:, :, None], shape).reshape(rows, count)

    def pair(n):
        """Codes n and n + 4: [r, n, 2]."""
        low, high = (value * scales for value in _decoded(words >> (4 * n)))
        return jnp.stack([low.astype(dtype), high.astype(dtype)], axis=-1)

    # Each stack adds the next lower bit of a code's place in its word.
    even = jnp.stack([pair(0), pair(2)], axis=-1)
    odd = jnp.stack([pair(1), pair(3)], axis=-1)
    return jnp.stack([even, odd], axis=-1).reshape(rows, CODES * count)


def _decoded(words):
    """float32 values times 2^-14 of the codes in bits 0 to 3 and 16 to 19.

    Sign, exponent and mantissa go where a float16 has them, both codes at once. E2M1's subnormals
    then are float16's, and its exponents are smaller by 14.
    """
    bits = ((words << 12) & -0x7FFF8000) | ((words << 9) & 0x0E000E00)
    for half in (bits, bits >> 16):
        value = jax.lax.bitcast_convert_type(half.astype(jnp.int16), jnp.float16)
        yield value.astype(jnp.float32)


def _scales(scales):
    """float32 2^(byte - 127 + 14) of E8M0 bytes; bytes over 240 count as 240, which is 2^113."""
    exponent = scales.astype(jnp.int32)
    bits = jnp.where(exponent == 255, 0x7FC00000, (jnp.minimum(exponent, 240) + 14) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
