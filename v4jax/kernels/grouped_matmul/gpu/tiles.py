"""Tiles of the GPU kernels."""

import dataclasses

import numpy as np

from v4jax.kernels import blocks
from v4jax.kernels.grouped_matmul import formats, work_items

LEAST = 16  # of every side of a product on the tensor cores
FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows, columns of a result, contracted columns of a step; shared memory there is."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    memory: int

    def columns_of(self, total: int, most: int = 1 << 30) -> int:
        """Columns of a tile; more than the total only if that is smaller than any tile."""
        return _power_of_two(total, min(self.columns, most))

    def depth_of(self, contracted: int) -> int:
        """Contracted columns of a step."""
        return _power_of_two(contracted, self.depth)

    def stages_of(self, step_bytes: int) -> int:
        """Steps in flight: the table's, or fewer where shared memory is short."""
        return max(1, min(self.stages, self.memory // step_bytes))


def plan(x_XD, weights, rounding) -> Plan:
    """The table's tiles, cut for small groups and for four-byte operands."""
    table = blocks.blocks("cuda").grouped_matmul
    memory = blocks.MEMORY[blocks.chip("cuda")]
    rows = work_items.tile_rows(x_XD.shape[0], weights[0].shape[0], LEAST, table.rows)
    columns, depth = table.columns, table.depth
    if formats.kind(weights[0]) == "fp8":
        # A tile lies in one column of scale blocks.
        columns, depth = min(columns, 128), min(depth, 128)
    if formats.kind(weights[0]) == "fp4":
        # Half a byte an element: as many bytes in a row of the tile as of FP8.
        depth = 2 * depth
    if np.dtype(formats.gradient_dtype(weights, rounding)).itemsize == 4:
        # Three passes of the tensor cores hold both halves of every operand in registers.
        return Plan(min(rows, 64), min(columns, 64), min(depth, 32), 4, 2, memory)
    if rows <= FEW_ROWS:
        # Bound by the weights' bytes: short tiles, and as many of them in flight as fit.
        return Plan(rows, min(columns, 64), depth, 4, table.stages + 1, memory // 2)
    return Plan(rows, columns, depth, table.warps, table.stages, memory)


def _power_of_two(size, most):
    return min(most, max(2 * LEAST, 1 << (size - 1).bit_length()))
