"""Rotary position embedding: its frequencies (YaRN in compressing layers) and angles.

`ops.rope` rotates by them.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v4jax.config import ModelConfig, Yarn


def inverse_frequencies(config: ModelConfig, compressing: bool) -> Float[np.ndarray, " half"]:
    """The angle that a position adds to each channel pair, float32 [R/2] (architecture 4).

    Args:
      config: the sizes.
      compressing: True for CSA and HCA layers (compress_rope_theta with YaRN), False for
        window-only and full-attention layers (rope_theta as it is).
    """
    if compressing:
        return _frequencies(
            config.compress_rope_theta, config.qk_rope_head_dim, config.rope_scaling
        )
    return _frequencies(config.rope_theta, config.qk_rope_head_dim, None)


@functools.cache
def _frequencies(theta: float, rope_dim: int, yarn: Yarn | None):
    exponent = np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim)
    # The power is taken in float64 and rounded once: float32 pow differs between platforms.
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / power
    if yarn is None:
        return frequency
    low = max(math.floor(_correction(yarn.beta_fast, theta, rope_dim, yarn)), 0)
    high = min(math.ceil(_correction(yarn.beta_slow, theta, rope_dim, yarn)), rope_dim - 1)
    width = np.float32(high - low) if high > low else np.float32(0.001)
    pair = np.arange(rope_dim // 2, dtype=np.float32)
    ramp = np.clip((pair - np.float32(low)) / width, np.float32(0), np.float32(1))
    smooth = np.float32(1) - ramp
    return frequency / np.float32(yarn.factor) * (np.float32(1) - smooth) + frequency * smooth


def _correction(rotations, theta, rope_dim, yarn):
    """The pair index that makes `rotations` times over the original context."""
    period = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
    return rope_dim * math.log(period) / (2 * math.log(theta))


def rotations(frequency: np.ndarray, position: Int[Array, "*b"]):
    """cos and sin of position * frequency in float32, each [*b, R/2]."""
    frequency = jnp.expand_dims(jnp.asarray(frequency), tuple(range(position.ndim)))
    angle = position.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)
