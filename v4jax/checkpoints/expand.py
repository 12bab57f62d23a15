"""Stored weights as float32 or bfloat16, written into a buffer, in numpy.

Exact wherever the result is representable: XLA on a CPU flushes subnormals to zero, which weights
with very small scales reach, and numpy does not.
"""

import ml_dtypes
import numpy as np

from v4jax import block_sizes
from v4jax.errors import InputError

NAN_SCALE = 255  # the E8M0 byte that is no number

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BYTES = np.arange(256)
_E2M1_PAIRS = np.stack([_E2M1[_BYTES & 15], _E2M1[_BYTES >> 4]], axis=-1)
_E4M3 = _BYTES.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.ldexp(np.float32(1), np.minimum(_BYTES, NAN_SCALE - 1) - 127)


def check_scales(key: str, scales: np.ndarray) -> None:
    """Raises where an E8M0 scale is not a number."""
    bad = np.flatnonzero(scales == NAN_SCALE)
    if bad.size:
        raise InputError(
            f"{key}: {bad.size} of {scales.size} E8M0 scales are NaN (byte 255), first at flat "
            f"index {bad[0]}; the file is damaged, so get it again"
        )


def expand(key: str, values: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Writes the numbers that an FP8 or FP4 matrix stands for.

    Args:
      key: its name, for errors.
      values: [rows, columns] float8_e4m3fn, or uint8 [rows, columns / 2] packed FP4.
      scales: uint8 (E8M0) or float32, one a 128 x 128 block (FP8) or a 32 columns (FP4).
      out: [rows, columns] float32 or bfloat16. Products of E8M0 scales are exact unless they leave
        its range; those of float32 scales are rounded once to float32 (and once more to bfloat16).

    Raises:
      InputError: a NaN scale, or a number too large for `out`.
    """
    if scales.dtype == np.uint8:
        check_scales(key, scales)
        factors = _E8M0[scales]
    else:
        factors = scales
    with np.errstate(over="ignore"):
        for start in range(0, len(out), block_sizes.FP8):
            rows = slice(start, start + block_sizes.FP8)
            out[rows] = _numbers(values[rows], factors, rows)
            _check_range(key, out[rows])


def _numbers(values, factors, rows):
    if values.dtype == np.uint8:
        pairs = _E2M1_PAIRS[values]
        groups = pairs.reshape(len(values), -1, block_sizes.FP4)
        return (groups * factors[rows, :, None]).reshape(len(values), -1)
    factor = np.repeat(factors[rows.start // block_sizes.FP8], block_sizes.FP8)[: values.shape[1]]
    return _E4M3[values.view(np.uint8)] * factor


def _check_range(key, out):
    """Only overflow is an error; a NaN that is stored stays one."""
    if np.isinf(out).any():
        raise InputError(
            f"{key}: a value times its scale is beyond the range of {out.dtype}; the scale is "
            "damaged, or keep this checkpoint in its stored form (--weights=stored)"
        )
