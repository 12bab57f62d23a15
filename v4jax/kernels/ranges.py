"""Ranges of entries that queries may see: low <= e < high, of each query its own."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def in_list(
    low_BT: Int[Array, "b t"], high_BT: Int[Array, "b t"], entries: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """The ranges without what lies outside a list of so many entries, which kernels load as is."""
    return jnp.maximum(low_BT, 0), jnp.minimum(high_BT, entries)


def visible(
    chosen_BTK: Int[Array, "b t k"], low_BT: Int[Array, "b t"], high_BT: Int[Array, "b t"]
) -> Int[Array, "b t k"]:
    """A choice with -1 for each entry outside its query's range: kernels fetch them by index."""
    seen = (chosen_BTK >= low_BT[..., None]) & (chosen_BTK < high_BT[..., None])
    return jnp.where(seen, chosen_BTK, -1)
