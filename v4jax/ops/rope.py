"""The rotation of rotary position embedding: interleaved pairs, the last R channels.

    y[2i]     = x[2i] cos[i] - x[2i + 1] sin[i]
    y[2i + 1] = x[2i + 1] cos[i] + x[2i] sin[i]

The gradient is the rotation back. `rotated` is the same without a rounding, in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from v4jax.ops import derivatives
from v4jax.quant import keep_in_bf16, round_to


def rotate(
    x: Array,
    cos: Array,
    sin: Array,
    dtype,
    inverse: bool = False,
    implementation: str | None = None,
) -> Inexact[Array, "..."]:
    """Rotates the last R channels of x by the angles, in float32, and rounds to `dtype`.

    Args:
      x: [*b, H]; cos, sin: [*b, R/2], or with 1s where they broadcast (heads). No gradient of them.
      inverse: rotate back, which attention's output needs since values carry the key's rotation.
      implementation: "reference" for a function with derivatives of every order.
    """
    return derivatives.of(_rotate, implementation)(dtype, x, cos, -sin if inverse else sin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(dtype, x, cos, sin):
    # What is shifted is not computed three times but stored, so it had better be short.
    return round_to(rotated(keep_in_bf16(x), cos, sin), dtype)


def _rotate_forward(dtype, x, cos, sin):
    return _rotate(dtype, x, cos, sin), (jnp.zeros((0,), x.dtype), cos, sin)


def _rotate_backward(dtype, saved, g):
    """The rotation back. The shifts' own derivatives would be three float32 arrays of x's shape."""
    like, cos, sin = saved
    return _rotate(like.dtype, g, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def rotated(x: Array, cos: Array, sin: Array) -> Float[Array, "..."]:
    """x rotated, in float32, not rounded; derivatives are in `rotate`."""
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
