"""Arrays whose second axis is the queries, cut into blocks of them."""

import einops
import jax.numpy as jnp


def pad(x, before=0, after=0):
    """Zeros along the queries."""
    if not before and not after:
        return x
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def split(x, parts):
    """[B,Q,...] -> [parts, B, Q/parts, ...]"""
    return einops.rearrange(x, "b (p q) ... -> p b q ...", p=parts)


def join(x):
    """The inverse of `split`."""
    return einops.rearrange(x, "p b q ... -> b (p q) ...")
