"""The rule by which the scales of stored weights follow the weights that are trained.

A group (32 inputs of FP4, a 128 x 128 block of FP8) keeps its scale s while its largest magnitude a
fits it:

    FP4    2.5 s < a <= 7 s       else the least power of two times s with a <= 6 s
    FP8   1.75 s < a <= 464 s     else the least power of two times s with a <= 448 s

and for as long as s holds every value of the group exactly, whatever a is.

Upper bounds: half a step of the grid beyond its largest value. Up to there a value is rounded to
that largest value with an error that values below it have too (1 s in FP4, 16 s in FP8): keeping s
clips nothing by more than it rounds. The bound is not 6 s, because one stored group in four has a
value at exactly 6 s (of normal weights): a growth of one part in a million would double its scale,
and with a doubled scale the codes 0.5 and 1.5 are lost, a quarter of the group's values.

Lower bounds: in FP4 a group with a <= 2.5 s has no code above 2, and half the scale represents the
same values and those between them. Fresh scales have 3 s < a <= 6 s, so the bounds leave half a
step on both sides. In FP8 a smaller scale gains nothing but finer steps next to zero. They are
2^-9 s, 1 / 900 of the largest value at 1.75 s, and far below the rounding of all others.

Hysteresis: an FP4 scale that doubled at 7 s is halved at 5 s, one that was halved at 2.5 s doubles
at 3.5 s; an FP8 scale that doubled at 464 s comes back at 3.5 s. A change is by a power of two
also where scales are float32, since every other factor moves every value off the grid.

The power of two is that of `quant.quantize_fp4` and `quant.quantize_fp8` without scales (E8M0), and
like them takes the largest magnitude to be no less than a least one (FP8 1e-4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from v4jax import quant


class _Fit(NamedTuple):
    """The bounds of a / s: above `least`, up to `most`; `largest` is the grid's largest value."""

    least: float
    most: float
    largest: float


_FIT = {"fp4": _Fit(2.5, 7.0, 6.0), "fp8": _Fit(1.75, 464.0, 448.0)}
_LEAST_AMAX = 1e-4  # of float32 scales, as `quant.quantize_fp8` has it


def next_scales(w: ArrayLike, scales: ArrayLike, kind: str) -> jax.Array:
    """The scales with which `w` is stored, by the rule above, after `scales`.

    Applied again to the same w they do not change.

    Args:
      w: finite [..., out, in], any float type.
      scales: those before, as in `quant.QTensor`. kind: "fp4" or "fp8".

    Returns:
      As scales.

    Raises:
      ValueError: scales of another shape or type than the kind's.
    """
    encode = {"fp4": quant.quantize_fp4, "fp8": quant.quantize_fp8}[kind]
    w = jnp.asarray(w).astype(jnp.float32)
    before = encode(w, scales)
    amax = quant.block_max(jnp.abs(w), before.block)
    off = (before.dequantize() != w).astype(jnp.float32)
    kept = _fits(amax, before.scales, _FIT[kind]) | (quant.block_max(off, before.block) == 0)
    if before.scales.dtype == jnp.float32:
        changed = _stretched(amax, before.scales, _FIT[kind])
    else:
        changed = encode(w).scales
    return jnp.where(kept, before.scales, changed)


def _fits(amax, scales, fit):
    s = quant.e8m0_to_float(scales) if scales.dtype == jnp.uint8 else scales
    return (amax > np.float32(fit.least) * s) & (amax <= np.float32(fit.most) * s)


def _stretched(amax, scales, fit):
    """float32 scales times the least power of two with which nothing is clipped."""
    largest = jnp.maximum(amax, np.float32(_LEAST_AMAX))
    return scales * quant.pow2_ceil(largest / (np.float32(fit.largest) * scales))
