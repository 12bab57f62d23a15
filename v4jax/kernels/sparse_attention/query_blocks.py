"""Arrays whose second axis is the queries, cut into blocks of them."""

import jax.numpy as jnp


def pad(x, before=0, after=0):
    """Zeros along the queries."""
    if not before and not after:
        return x
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def split(x, parts):
    """[B,Q,...] -> [parts, B, Q/parts, ...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)


def join(x):
    """The inverse of `split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
