"""Tiles of stored weights in VMEM, and their products with rows of activations.

A tile is [columns, contracted] if `transposed` (x w^T) and [contracted, columns] if not (x w).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.grouped_matmul import formats
from v4jax.kernels.grouped_matmul.operands import Weight

FP8 = 128
FP4 = 32


def arrays(weight) -> Weight:
    """The arrays that hold [E, out, in]."""
    kind = formats.kind(weight)
    if kind == "float":
        return Weight(weight)
    scales = formats.float_scales(weight) if kind == "fp8" else weight.scales
    return Weight(weight.values, scales)


def specs(weight: Weight, kind: str, transposed: bool, columns: int) -> Weight:
    """Their blocks, for a grid (columns, items) and work items as prefetched scalars."""
    values, scales = weight
    if kind == "float":
        return Weight(_spec(values.shape, transposed, columns))
    if kind == "fp8":
        # All scales of an expert, as scalars.
        whole = pl.BlockSpec((1, *scales.shape[1:]), _whole_expert, memory_space=pltpu.SMEM)
        return Weight(_spec(values.shape, transposed, columns), whole)
    if transposed:
        return Weight(_spec(values.shape, True, columns), _spec(scales.shape, True, columns))
    return Weight(
        values=_spec(values.shape, False, columns // 2),
        scales=pl.BlockSpec((1, *scales.shape[1:]), _whole_expert),
    )


def _whole_expert(j, i, work):
    return work.group_I[i], 0, 0


def add_product(total, x, weight: Weight, kind, transposed, chunk, depth, column):
    """Adds a chunk of x's contracted columns times the tile's to `total`.

    Args:
      total: [parts, rows, columns / parts], float32.
      x: [parts, rows, contracted / parts].
      weight: references to a tile, as `specs` cuts it; kind: its `formats.kind`.
      chunk, depth: which chunk, of how many contracted columns.
      column: which tile of columns this is.
    """
    dtype = x.dtype
    parts = x.shape[0] if transposed else total.shape[0]
    width = depth // parts if transposed else depth
    start = chunk * width if isinstance(chunk, int) else pl.multiple_of(chunk * width, width)
    tiles = _expanded(weight, kind, start, width, column, transposed, dtype)
    for part, tile in enumerate(tiles):
        if transposed:
            total[0] += dot(x[part, :, pl.ds(start, width)], tile, (1, 1))
        else:
            total[part] += dot(x[0, :, pl.ds(start, width)], tile, (1, 0))


def dot(x, y, axes):
    """x times y over one axis each, summed in float32; float32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, numbers, precision=precision, preferred_element_type=jnp.float32
    )


def _spec(shape, transposed, columns):
    if transposed:
        return pl.BlockSpec((1, columns, shape[2]), lambda j, i, work: (work.group_I[i], j, 0))
    return pl.BlockSpec((1, shape[1], columns), lambda j, i, work: (work.group_I[i], 0, j))


def _expanded(weight, kind, start, depth, column, transposed, dtype):
    """The chunk of the tile as matrices of `dtype`: one, or even and odd columns of FP4."""
    values, scales = weight
    chunk = values[0, :, pl.ds(start, depth)] if transposed else values[0, pl.ds(start, depth), :]
    if kind == "float":
        return [chunk.astype(dtype)]
    if kind == "fp8":
        first = column * (values.shape[1 if transposed else 2] // FP8)
        row, col = (first, start // FP8) if transposed else (start // FP8, first)
        return [_expand_fp8(chunk, scales, row, col).astype(dtype)]
    scales = scales[0] if transposed else scales[0, pl.ds(start, depth), :]
    first = start if transposed else column * values.shape[2]
    scales = _spread(_twice_scales(scales), first, chunk.shape[1])
    codes = chunk.astype(jnp.int32)
    return [(_half_decoded(nibble) * scales).astype(dtype) for nibble in (codes & 15, codes >> 4)]


def _expand_fp8(values, scales, row, column):
    """E4M3 values times the scalar of each 128 x 128 block, the first being (row, column)."""
    height, width = values.shape
    values = values.astype(jnp.bfloat16).astype(jnp.float32)

    def block(r, c):
        return values[r : r + FP8, c : c + FP8] * scales[0, row + r // FP8, column + c // FP8]

    rows = [
        jnp.concatenate([block(r, c) for c in range(0, width, FP8)], axis=1)
        for r in range(0, height, FP8)
    ]
    return jnp.concatenate(rows, axis=0)


def _half_decoded(codes):
    """Half the value of E2M1 codes (int32), float32; half, so that the scale can be twice its own.

    With the exponent's bias in place the codes 0 and 1 would be 0.5 and 0.75 instead of 0 and 0.5;
    2 v - 1 repairs these two and is no smaller than v for the others. Here all of it halved.
    """
    bits = ((codes & 7) << 22) + (125 << 23)
    value = pltpu.bitcast(bits, jnp.float32)
    value = jnp.minimum(value, 2 * value - 0.5)
    return pltpu.bitcast(pltpu.bitcast(value, jnp.int32) | ((codes & 8) << 28), jnp.float32)


def _twice_scales(scales):
    """bfloat16 2^(byte - 126) of E8M0 bytes: no subnormal for byte 0, and the largest for 254."""
    exponent = scales.astype(jnp.int32)
    bits = jnp.where(exponent == 255, 0x7FC00000, jnp.minimum(exponent + 1, 254) << 23)
    return pltpu.bitcast(bits, jnp.float32).astype(jnp.bfloat16)


def _spread(scales, first, width):
    """Each scale [rows, n] at its 16 packed columns of [rows, width], the first being `first`.

    By a matrix of zeros and ones: it repeats lanes on the MXU, which has time to spare while the
    codes are decoded, and picks the tile's own scales without a slice. Exact: one term per sum.
    """
    shape = (scales.shape[1], width)
    source = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    chosen = (column // (FP4 // 2) == source).astype(jnp.float32).astype(jnp.bfloat16)
    return dot(scales, chosen, (1, 0))
