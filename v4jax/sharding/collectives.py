"""Collectives over the mesh axes of a logical axis; over none of them each is the identity.

For use inside `shard_map`. Axes are tuples of mesh axes, the first varying slowest.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """All shards' parts side by side along `dimension`."""
    if not axes:
        return x
    return lax.all_gather(x, axes, axis=dimension, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_as(x: jax.Array, axes: tuple[str, ...], dimension: int, dtype: str) -> jax.Array:
    """`gather` of x rounded to `dtype`, which is what travels; the gradient's sum is in x's own."""
    return gather(x.astype(dtype), axes, dimension)


def _gather_forward(x, axes, dimension, dtype):
    return gather_as(x, axes, dimension, dtype), jnp.zeros((0,), x.dtype)


def _gather_backward(axes, dimension, dtype, like, dy):
    return (scatter_total(dy.astype(like.dtype), axes, dimension),)


gather_as.defvjp(_gather_forward, _gather_backward)


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over shards."""
    return lax.psum(x, axes) if axes else x


def largest(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The maximum over shards; passes no gradient."""
    return lax.pmax(lax.stop_gradient(x), axes) if axes else x


def scatter_total(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The sum over shards, of which each keeps its part of `dimension`."""
    if not axes:
        return x
    return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)


def part(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """This shard's part of an array that all have whole."""
    if not axes:
        return x
    length = x.shape[dimension] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * length, length, dimension)


def from_left(x: jax.Array, axes: tuple[str, ...], distance: int = 1) -> jax.Array:
    """The array of the shard `distance` places before this one; zeros where there is none."""
    count = lax.axis_size(axes)
    if distance >= count:
        return jnp.zeros_like(x)
    return lax.ppermute(x, axes, [(i, i + distance) for i in range(count - distance)])
