"""Tiles of the TPU kernels: as large as VMEM allows, within the table's sizes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from v4jax.kernels import blocks
from v4jax.kernels.grouped_matmul import formats, work_items

LANES = 128
MOST = 60 << 20
LEAST_ROWS = 16  # a bfloat16 register's


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows, columns of a result and contracted columns of a chunk; VMEM needed and there is."""

    rows: int
    columns: int
    depth: int
    bytes: int
    memory: int

    def columns_of(self, total: int, parts: int) -> int:
        """The columns of a tile: whole registers that divide the total, or else all of it."""
        return _divisor(total, self.columns, LANES * parts)

    def depth_of(self, contracted: int) -> int:
        """The same for a chunk, of whole registers even of packed FP4."""
        return _divisor(contracted, self.depth, 2 * LANES)


def plan(x_XD, weights, rounding) -> Plan:
    """The largest tiles that fit, or the smallest there are; `bytes` tells."""
    table = blocks.blocks("tpu").grouped_matmul
    # The compiler keeps some for itself; more than 60 MiB of tiles would not read a byte less.
    memory = min(blocks.MEMORY[blocks.chip("tpu")] * 15 // 16, MOST)
    rows = work_items.tile_rows(x_XD.shape[0], weights[0].shape[0], LEAST_ROWS, table.rows)
    columns = max(table.columns, LANES)
    while True:
        sizes = Plan(rows, columns, table.depth, 0, memory)
        sizes = dataclasses.replace(sizes, bytes=_needed(sizes, weights, rounding))
        if sizes.bytes <= memory or columns <= LANES:
            return sizes
        columns //= 2


def _divisor(total, most, unit):
    if total <= most:
        return total
    candidates = range(most // unit * unit, 0, -unit)
    return next((size for size in candidates if total % size == 0), total)


def _needed(sizes, weights, rounding):
    """VMEM bytes of the largest of the calls: the gradients through up and of x."""
    _, f, d = weights[0].shape
    operand = np.dtype(formats.gradient_dtype(weights, rounding)).itemsize
    kept = jnp.dtype(rounding.dtype).itemsize
    parts = formats.parts(weights[0])
    up = _call_bytes(sizes, d, sizes.columns_of(f, 1), weights[0], operand, lhs=1, results=4 * kept)
    dx = _call_bytes(sizes, f, sizes.columns_of(d, parts), weights[0], operand, lhs=2, results=kept)
    return max(up, dx)


def _call_bytes(sizes, contracted, columns, weight, operand, lhs, results):
    rows, elements = sizes.rows, contracted * columns
    stored = elements * {"fp4": 0.625, "fp8": 1}.get(formats.kind(weight), 0)
    if formats.kind(weight) == "float":
        stored = elements * weight.dtype.itemsize
    buffers = 2 * (2 * stored + lhs * rows * contracted * operand + rows * columns * results)
    gate = 2 * rows * LANES * 4
    chunk = sizes.depth_of(contracted) * columns * (8 + operand)
    return int(buffers + gate + chunk + 5 * rows * columns * 4)
