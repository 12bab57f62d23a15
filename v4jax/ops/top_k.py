"""The k largest of a row without a sort: XLA:CPU sorts whole rows for a `top_k`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def largest(scores: Float[Array, "b t e"], k: int) -> Int[Array, "b t k"]:
    """The indices of the k largest of each row, in order, ties to the lower index.

    As `jax.lax.top_k`, which takes two to six times as long on a CPU.
    """
    expert, found = jnp.arange(scores.shape[-1], dtype=jnp.int32), []
    for _ in range(k):
        best = jax.lax.argmax(scores, scores.ndim - 1, jnp.int32)
        scores = jnp.where(expert[None, None] == best[..., None], -jnp.inf, scores)
        found.append(best)
    return jnp.stack(found, axis=-1)
