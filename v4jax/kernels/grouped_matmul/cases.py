"""Shapes that tests and benchmarks share: small odd ones, and the released models'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import quant

# Of as many experts each for as many rows, so that one compiled program serves them all.
ROWS = 167
GROUPS = {
    "even": (28, 28, 28, 28, 28, 27),
    "empty_groups": (0, 67, 0, 0, 100, 0),
    "one_has_all": (0, 0, 167, 0, 0, 0),
    "single_rows": (1, 0, 1, 1, 163, 1),
    "skewed": (1, 96, 3, 33, 32, 2),
    "whole_pieces": (64, 0, 0, 39, 64, 0),  # of xla.py, at the longest it has for these rows
    "rows_behind": (3, 0, 70, 0, 31, 0),
    "no_rows": (0, 0, 0, 0, 0, 0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows (tokens times top-k), experts and sizes of one call."""

    rows: int
    experts: int
    d: int
    f: int


REAL = {
    "flash": Case(rows=4096 * 6, experts=256, d=4096, f=2048),
    "flash_decode": Case(rows=64 * 6, experts=256, d=4096, f=2048),
    "pro": Case(rows=4096 * 6, experts=384, d=7168, f=3072),
    "pro_decode": Case(rows=64 * 6, experts=384, d=7168, f=3072),
}


def inputs(sizes, d: int, f: int, dtype="float32", rows: int | None = None):
    """Random x, gate, weights (w1, w2, w3) and the group sizes.

    Args:
      rows: as many as the groups have, or more: those behind the last group.
    """
    keys = jax.random.split(jax.random.key(len(sizes)), 5)
    rows, experts = sum(sizes) if rows is None else rows, len(sizes)

    def normal(key, *shape):
        return (jax.random.normal(key, shape) * 0.4).astype(dtype)

    shapes = ((experts, f, d), (experts, d, f), (experts, f, d))
    weights = tuple(normal(key, *shape) for key, shape in zip(keys[2:], shapes, strict=True))
    gate = 1 + normal(keys[1], rows).astype(jnp.float32)
    return normal(keys[0], rows, d), gate, weights, jnp.asarray(sizes, jnp.int32)


def specs(case: Case, kind: str):
    """Shapes and types of a call's x, gate, group sizes and weights, bfloat16 activations.

    Args:
      kind: "bfloat16" or "float32" weights, or "fp8" or "fp4" stored ones.
    """

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def weight(rows, columns):
        shape = (case.experts, rows, columns)
        if kind == "fp8":
            blocks = (case.experts, -(-rows // 128), -(-columns // 128))
            return quant.QTensor(spec(shape, jnp.float8_e4m3fn), spec(blocks, np.uint8))
        if kind == "fp4":
            packed, scales = (*shape[:2], columns // 2), (*shape[:2], columns // 32)
            return quant.QTensor(spec(packed, np.uint8), spec(scales, np.uint8))
        return spec(shape, kind)

    weights = (weight(case.f, case.d), weight(case.d, case.f), weight(case.f, case.d))
    x, gate = spec((case.rows, case.d), jnp.bfloat16), spec((case.rows,), np.float32)
    return x, gate, spec((case.experts,), np.int32), weights
