"""RMSNorm over the last axis, in float32.

    y = x / sqrt(mean(x^2) + eps) * scale

The gradient is written by hand: its two sums over channels are a CPU's slowest reductions, and
`ops.products` takes them as matrix products there.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from v4jax.ops import products


def inverse_rms(x: Inexact[Array, "*b d"], eps: float) -> Float[Array, "*b"]:
    """1 / rms(x) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rms_norm(
    eps: float, x: Inexact[Array, "*b d"], scale_D: Float[Array, " d"]
) -> Float[Array, "*b d"]:
    """x / rms(x) over the last axis, times a weight, in float32."""
    return _rms_norm_forward(eps, x, scale_D)[0]


def _rms_norm_forward(eps, x, scale_D):
    inverse = inverse_rms(x, eps)
    return _scaled(x, inverse) * _over_last(scale_D, x), (x, scale_D, inverse)


def _rms_norm_backward(eps, saved, g):
    """dx = (dn - n mean(dn n)) / rms(x), n the normed row."""
    x, scale_D, inverse = saved
    n = _scaled(x, inverse)
    dn = g * _over_last(scale_D, x)
    along = products.over_channels(dn, n) / x.shape[-1]
    dx = _scaled(dn - _scaled(n, along), inverse)
    return dx.astype(x.dtype), products.over_rows(g, n)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _scaled(x, by):
    """Each row times its number, in float32."""
    return x.astype(jnp.float32) * by[..., None]


def _over_last(scale_D, x):
    return jnp.expand_dims(scale_D, tuple(range(x.ndim - 1)))
