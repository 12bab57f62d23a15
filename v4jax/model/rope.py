"""Rotary position embedding: interleaved pairs, the last R channels, YaRN in compressing layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

from v4jax.config import ModelConfig, Yarn
from v4jax.ops import derivatives
from v4jax.quant import keep_in_bf16, round_to


def inverse_frequencies(config: ModelConfig, compressing: bool) -> Float[np.ndarray, " half"]:
    """The angle a position turns each channel pair, float32 [R/2] (architecture section 4).

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
    """The pair index that turns `rotations` times over the original context."""
    period = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
    return rope_dim * math.log(period) / (2 * math.log(theta))


def rotations(frequency: np.ndarray, position: Int[Array, "*b"]):
    """cos and sin of position * frequency in float32, each [*b, R/2]."""
    frequency = jnp.expand_dims(jnp.asarray(frequency), tuple(range(position.ndim)))
    angle = position.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Array,
    cos: Array,
    sin: Array,
    dtype,
    inverse: bool = False,
    implementation: str | None = None,
) -> Inexact[Array, "..."]:
    """Turns the last R channels of x by the angles, in float32, and rounds to `dtype`.

    Args:
      x: [*b, H]; cos, sin: [*b, R/2], or with 1s where they broadcast (heads). No gradient of them.
      inverse: turn back, which attention's output needs since values carry the key's rotation.
      implementation: "reference" for a function with derivatives of every order.
    """
    return derivatives.of(_rotate, implementation)(dtype, x, cos, -sin if inverse else sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(dtype, x, cos, sin):
    # What is shifted is not computed three times but stored, so it had better be short.
    return round_to(turned(keep_in_bf16(x), cos, sin), dtype)


def _rotate_forward(dtype, x, cos, sin):
    return _rotate(dtype, x, cos, sin), (jnp.zeros((0,), x.dtype), cos, sin)


def _rotate_backward(dtype, saved, g):
    """The turn back. The shifts' own derivatives would be three float32 arrays of x's shape."""
    like, cos, sin = saved
    return _rotate(like.dtype, g, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def turned(x: Array, cos: Array, sin: Array) -> Float[Array, "..."]:
    """x turned, in float32, not rounded; derivatives are in `rotate`."""
    kept = x.shape[-1] - 2 * cos.shape[-1]
    cos, sin = _over_channels(cos, kept), _over_channels(sin, kept)
    channel = jnp.expand_dims(jnp.arange(x.shape[-1], dtype=jnp.int32), tuple(range(x.ndim - 1)))
    # Shifting the row by one either way is one pass; taking the pairs apart is several slow ones.
    partner = jnp.where((channel - kept) % 2 == 0, -_shifted(x, -1), _shifted(x, 1))
    x, partner = x.astype(jnp.float32), partner.astype(jnp.float32)
    return jnp.where(channel < kept, x, x * cos + partner * sin)


def _over_channels(angles, kept):
    """[*b, R/2] -> [*b, H]: each value for both channels of its pair, behind `kept` zeros."""
    pairs = jnp.repeat(angles, 2, axis=-1)
    return jnp.pad(pairs, [(0, 0)] * (pairs.ndim - 1) + [(kept, 0)])


def _shifted(x, by):
    """x with channel c at c + by, a zero where there is none."""
    zero = jnp.zeros((), x.dtype)
    return jax.lax.pad(x, zero, [(0, 0, 0)] * (x.ndim - 1) + [(by, -by, 0)])
