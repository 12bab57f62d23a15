"""Block formats of the official checkpoints and the rounding of its activations.

FP8: E4M3 values with one scale per 128 x 128 block of a [out, in] matrix; FP4: E2M1 values with one
scale per 32 inputs, two codes per byte, low nibble first. A scale is a power of two stored as its
E8M0 byte, or (base checkpoints, FP8 only) a float32. The rules are section 10 of the
specification.

Everything here is exact wherever the result is a normal float32: powers of two come from exponent
bits, never from a logarithm, and no division by a constant is left to XLA, which multiplies by the
rounded reciprocal instead. Magnitudes below 2^-126 are zero on CPU and TPU, whose arithmetic
flushes subnormals.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from v4jax import block_sizes
from v4jax.reprs import short_repr

FP8_BLOCK = (block_sizes.FP8, block_sizes.FP8)
FP4_BLOCK = (1, block_sizes.FP4)
_E8M0_BIAS = 127


@dataclasses.dataclass(frozen=True)
class _Grid:
    """A small float type: its largest value, its rounding, and the least amax that sets a scale."""

    largest: float
    mantissa_bits: int
    min_exponent: int
    least_amax: float


_E4M3 = _Grid(largest=448.0, mantissa_bits=3, min_exponent=-6, least_amax=1e-4)
_E2M1 = _Grid(largest=6.0, mantissa_bits=1, min_exponent=0, least_amax=6 * 2.0**-126)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A matrix as a checkpoint stores it; leading axes (layers, experts) lead both leaves.

    Attributes:
      values: float8_e4m3fn [..., out, in] (FP8) or uint8 [..., out, in / 2] (FP4, packed).
      scales: E8M0 bytes (uint8) or float32, [..., ceil(out / 128), ceil(in / 128)] for FP8; E8M0
        bytes [..., out, in / 32] for FP4.
    """

    values: Any
    scales: Any

    @property
    def kind(self) -> str:
        """The format, "fp8" or "fp4"."""
        kinds = {"float8_e4m3fn": "fp8", "uint8": "fp4"}
        name = np.dtype(self.values.dtype).name
        if name not in kinds:
            raise ValueError(f"QTensor values are {name}; expected one of {list(kinds)}")
        return kinds[name]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        return FP8_BLOCK if self.kind == "fp8" else FP4_BLOCK

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape [..., out, in]."""
        *leading, columns = self.values.shape
        return (*leading, columns if self.kind == "fp8" else 2 * columns)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """See `dequantize`."""
        return dequantize(self, dtype)

    def __repr__(self) -> str:
        return short_repr(self)


# For `flax.serialization.to_bytes(params)`, to which jax's registration means nothing.
serialization.register_serialization_state(
    QTensor,
    lambda q: {"values": q.values, "scales": q.scales},
    lambda q, state: QTensor(state["values"], state["scales"]),
)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of variables is a `QTensor`."""
    return isinstance(leaf, QTensor)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The matrix [..., out, in] that `q` stands for.

    With E8M0 scales the product is exact in float32 and bfloat16. With float32 scales it is rounded
    to float32, and from there to `dtype`.
    """
    stored, scales = jnp.asarray(q.values), jnp.asarray(q.scales)
    values = stored.astype(jnp.float32) if q.kind == "fp8" else fp4_unpack(stored)
    if scales.dtype == jnp.uint8:
        return _times_exp2(values, scales.astype(jnp.int32) - _E8M0_BIAS, q.block).astype(dtype)
    return (values * _spread(scales, q.block, values.shape)).astype(dtype)


@functools.partial(jax.jit, static_argnames="scale_dtype", inline=True)
def quantize_fp8(
    w: ArrayLike, scales: ArrayLike | None = None, scale_dtype: str = "e8m0"
) -> QTensor:
    """Rounds finite matrices to E4M3, to nearest even and clipped to +-448.

    Args:
      w: [..., out, in], any float type and any size.
      scales: stored scales, as in `QTensor`: what `dequantize` gave comes back byte for byte. None:
        fresh ones, which for such a matrix can differ from the stored.
      scale_dtype: of fresh scales: "e8m0" (the least power of two that avoids clipping) or
        "float32" (amax / 448, rounded).

    Raises:
      ValueError: for scales of another shape or type, or another scale_dtype.
    """
    w = jnp.asarray(w).astype(jnp.float32)
    if scale_dtype not in ("e8m0", "float32"):
        raise ValueError(f"scale_dtype is {scale_dtype!r}; expected 'e8m0' or 'float32'")
    if scales is None:
        amax = _amax(w, FP8_BLOCK, _E4M3)
        float_scales = amax * np.float32(1 / _E4M3.largest)
        scales = _e8m0_byte(amax, _E4M3) if scale_dtype == "e8m0" else float_scales
    scales = _check_scales(scales, w.shape, FP8_BLOCK, ("uint8", "float32"))
    if scales.dtype == jnp.uint8:
        scaled = _times_exp2(w, _E8M0_BIAS - scales.astype(jnp.int32), FP8_BLOCK)
    else:
        scaled = w / _spread(scales, FP8_BLOCK, w.shape)
    # The values are on the grid before the cast, so no backend's cast rounds or overflows.
    values = _round(jnp.clip(scaled, -_E4M3.largest, _E4M3.largest), _E4M3)
    return QTensor(values.astype(jnp.float8_e4m3fn), scales)


@functools.partial(jax.jit, inline=True)
def quantize_fp4(w: ArrayLike, scales: ArrayLike | None = None) -> QTensor:
    """Rounds finite matrices to packed E2M1, to nearest even and clipped to +-6.

    Args:
      w: [..., out, in], any float type, `in` a multiple of 32.
      scales: as for `quantize_fp8`, E8M0 bytes only.

    Raises:
      ValueError: for another `in`, or scales of another shape or type.
    """
    w = jnp.asarray(w).astype(jnp.float32)
    if w.shape[-1] % FP4_BLOCK[1]:
        raise ValueError(f"FP4 needs a last axis divisible by {FP4_BLOCK[1]}; w is {w.shape}")
    if scales is None:
        scales = _e8m0_byte(_amax(w, FP4_BLOCK, _E2M1), _E2M1)
    scales = _check_scales(scales, w.shape, FP4_BLOCK, ("uint8",))
    scaled = _times_exp2(w, _E8M0_BIAS - scales.astype(jnp.int32), FP4_BLOCK)
    return QTensor(fp4_pack(scaled), scales)


def fp4_unpack(packed: ArrayLike, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The values of packed E2M1 codes, without scales; code 8 is -0.

    Args:
      packed: uint8 [..., n / 2], low nibble first.
      dtype: float32 or bfloat16; both exact, and neither is made from the other.

    Returns:
      [..., n] of `dtype`.
    """
    packed = jnp.asarray(packed)
    if packed.dtype != jnp.uint8:
        raise ValueError(f"packed FP4 codes are {packed.dtype}; expected uint8")
    # A byte becomes two code bytes by arithmetic on uint16: a stack of the two nibbles costs half
    # as much again on a CPU, and a table of values is a slow gather on a TPU.
    pair = packed.astype(jnp.uint16)
    pair = (pair | (pair << 4)) & 0x0F0F
    codes = lax.bitcast_convert_type(pair, jnp.uint8)
    return _decode_e2m1(codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1]), dtype)


def fp4_pack(values: ArrayLike) -> jax.Array:
    """Rounds values [..., n], already divided by their scale, to E2M1 as `quantize_fp4` does.

    Returns:
      Codes, uint8 [..., n / 2], low nibble first.
    """
    values = jnp.asarray(values).astype(jnp.float32)
    if values.shape[-1] % 2:
        raise ValueError(f"FP4 packs pairs; the last axis of {values.shape} is odd")
    codes = _encode_e2m1(_round(jnp.clip(values, -_E2M1.largest, _E2M1.largest), _E2M1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def fake_quant_e4m3(x: ArrayLike, group: int) -> jax.Array:
    """Rounds to E4M3 and back, one power-of-two scale a `group` channels of the last axis.

    The gradient passes straight through: to every derivative this is the identity. An inf or NaN
    stays what it is.

    Args:
      x: [..., n], any float type; the last group may be shorter than the others.
      group: channels that share a scale.

    Returns:
      As x; exact in bfloat16 and float32.
    """
    return _fake_quant(jnp.asarray(x), group, _E4M3)


def fake_quant_e2m1(x: ArrayLike, group: int) -> jax.Array:
    """As `fake_quant_e4m3`, to E2M1."""
    return _fake_quant(jnp.asarray(x), group, _E2M1)


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in `dtype`, float32 or bfloat16, really rounded.

    A cast to bfloat16 and back is dropped by XLA where it fuses (its excess precision); an
    explicit reduction of precision is not.
    """
    if jnp.dtype(dtype) == jnp.bfloat16 and x.dtype != jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def keep_in_bf16(x: jax.Array) -> jax.Array:
    """Keeps x in bf16 on a TPU: without a barrier XLA saves the float32 it was rounded from.

    XLA does so for an array that is read in two places; it is twice the bytes.
    """
    return lax.platform_dependent(x, tpu=lax.optimization_barrier, default=lambda x: x)


def hadamard(x: ArrayLike) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of the last axis, in natural (Sylvester) order.

    Args:
      x: [..., n], n a power of two.

    Returns:
      As x: products and sums in float32, rounded once to x's type.
    """
    x = jnp.asarray(x)
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"the Hadamard transform needs a power of two; the last axis is {n}")
    # A matmul outruns the butterfly on a CPU already, and it is what the other backends are for.
    x32 = x.astype(jnp.float32)
    y = jnp.einsum("...i,ij->...j", x32, _sylvester(n), precision=lax.Precision.HIGHEST)
    return round_to(y * np.float32(n**-0.5), x.dtype)


def e8m0_to_float(scales: ArrayLike) -> jax.Array:
    """float32 2^(byte - 127) of E8M0 bytes: byte 0 is the subnormal 2^-127, byte 255 is NaN."""
    scales = jnp.asarray(scales).astype(jnp.uint32)
    bits = jnp.where(scales == 0, 1 << 22, scales << 23)
    bits = jnp.where(scales == 255, 0x7FC00000, bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def pow2_ceil(x: ArrayLike) -> jax.Array:
    """The least power of two at or above non-negative float32 x, from its exponent bits.

    0 gives 0, anything up to 2^-126 gives 2^-126, and inf and NaN give inf.
    """
    return _exp2(jnp.minimum(_ceil_log2(jnp.asarray(x, jnp.float32), 1.0), 128))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _fake_quant(x: jax.Array, group: int, grid: _Grid) -> jax.Array:
    # One row a position, so that a group is a block of one row.
    rows = x.astype(jnp.float32)[..., None, :]
    exponent = _ceil_log2(_amax(rows, (1, group), grid), grid.largest)
    shrink = _spread(_exp2(-exponent), (1, group), rows.shape)
    grow = _spread(_exp2(exponent), (1, group), rows.shape)
    return (_round(rows * shrink, grid) * grow)[..., 0, :].astype(x.dtype)


@_fake_quant.defjvp
def _straight_through(group, grid, primals, tangents):
    return _fake_quant(*primals, group, grid), *tangents


def _check_scales(scales, shape, block, dtypes) -> jax.Array:
    scales = jnp.asarray(scales)
    expected = (*shape[:-2], *(-(-size // b) for size, b in zip(shape[-2:], block, strict=True)))
    if scales.shape != expected or scales.dtype.name not in dtypes:
        raise ValueError(
            f"scales are {scales.dtype} {scales.shape}; a matrix {shape} in blocks of {block} "
            f"needs {' or '.join(dtypes)} {expected}"
        )
    return scales


def _amax(x: jax.Array, block: tuple[int, int], grid: _Grid) -> jax.Array:
    """The largest |x|, and no less than the grid's least, of each block of the last two axes."""
    return jnp.maximum(block_max(jnp.abs(x), block), grid.least_amax)


def block_max(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """The largest of each block of the last two axes of non-negative x; edges may be shorter."""
    *leading, rows, columns = x.shape
    padding = [(0, 0)] * len(leading) + [(0, -rows % block[0]), (0, -columns % block[1])]
    x = jnp.pad(x, padding)
    x = x.reshape(*leading, x.shape[-2] // block[0], block[0], x.shape[-1] // block[1], block[1])
    return x.max((-3, -1))


def _spread(scales: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Repeats each scale over its block, cut to the last two sizes of `shape`."""
    for axis in (-2, -1):
        if block[axis] > 1:
            scales = jnp.repeat(scales, block[axis], axis)
    return scales[..., : shape[-2], : shape[-1]]


def _times_exp2(x: jax.Array, exponents: jax.Array, block: tuple[int, int]) -> jax.Array:
    """x * 2^exponent of its block, exponents in -127..127; +-128, from the E8M0 NaN, gives NaN."""
    # Two factors, because 2^-127 itself is subnormal and would be flushed before the product.
    half = exponents >> 1
    first = jnp.where(jnp.abs(exponents) == 128, jnp.nan, _exp2(half))
    for factor in (first, _exp2(exponents - half)):
        x = x * _spread(factor, block, x.shape)
    return x


def _e8m0_byte(amax: jax.Array, grid: _Grid) -> jax.Array:
    return (_ceil_log2(amax, grid.largest) + _E8M0_BIAS).astype(jnp.uint8)


def _ceil_log2(x: jax.Array, unit: float) -> jax.Array:
    """int32 ceil(log2(x / unit)): the difference of exponents, plus 1 if x's mantissa is larger."""
    mantissa, exponent = math.frexp(unit)
    carry = 0x7FFFFF - int((2 * mantissa - 1) * 2**23)
    # |x|, because NaN may have its sign bit set.
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    return ((bits + carry) >> 23).astype(jnp.int32) - (127 + exponent - 1)


def _exp2(exponents: jax.Array) -> jax.Array:
    """float32 2^k, k in -126..127; 0 for -127 and inf for 128."""
    return lax.bitcast_convert_type((exponents + 127) << 23, jnp.float32)


def _round(x: jax.Array, grid: _Grid) -> jax.Array:
    """Rounds float32 to the grid's mantissa, to nearest even; keeps the sign of zero.

    Three times faster on a CPU than a cast to float8 and back, and no pass of XLA may drop it.
    """
    step = 2.0 ** (grid.min_exponent - grid.mantissa_bits)
    below = jnp.rint(x * (1 / step)) * step
    above = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=grid.mantissa_bits)
    return jnp.where(jnp.abs(x) < 2.0**grid.min_exponent, below, above)


def _decode_e2m1(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """E2M1 codes to a type with float32's exponent, written as its bits."""
    words, name = {"float32": jnp.uint32, "bfloat16": jnp.uint16}, np.dtype(dtype).name
    if name not in words:
        raise ValueError(f"dtype is {name}; expected one of {list(words)}")
    info, word = jnp.finfo(dtype), codes.astype(words[name])
    half = 126 << info.nmant
    # Codes 2 to 7 are exponent and mantissa bit in place; 0 and 1 are E2M1's own subnormals.
    magnitude = word & 7
    bits = jnp.where(magnitude < 2, magnitude * half, (magnitude << (info.nmant - 1)) + half)
    return lax.bitcast_convert_type(bits | ((word & 8) << (info.bits - 4)), dtype)


def _encode_e2m1(x: jax.Array) -> jax.Array:
    """float32 values on the E2M1 grid to their codes, uint8."""
    magnitude = jnp.abs(x)
    bits = lax.bitcast_convert_type(magnitude, jnp.uint32)
    code = jnp.where(magnitude < 1, (2 * magnitude).astype(jnp.uint32), (bits >> 22) - (126 << 1))
    return (code | (jnp.signbit(x).astype(jnp.uint32) << 3)).astype(jnp.uint8)


def _sylvester(n: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
