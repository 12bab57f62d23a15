"""The lightning indexer: scores of compressed entries, and the choice of the highest."""

import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from v4jax.kernels.indexer_topk import reference, xla

IMPLEMENTATIONS = {"xla": xla.indexer_topk, "reference": reference.indexer_topk}
index_scores = reference.index_scores


def indexer_topk(
    q_BTIZ: Inexact[Array, "b t i z"],
    weight_BTI: Inexact[Array, "b t i"],
    keys_BCZ: Inexact[Array, "b c z"],
    low_BT: Int[Array, "b t"],
    high_BT: Int[Array, "b t"],
    topk: int,
    *,
    chain: bool = False,
    implementation: str | None = None,
) -> Int[Array, "b t k"]:
    """The `topk` visible entries of highest score for every query, ties to the lower index.

    score[t, e] = sum over index heads of weight * relu(q . key)  (architecture section 6).

    Args:
      q_BTIZ: index queries, weight_BTI their heads' weights, keys_BCZ the entries' keys.
      low_BT, high_BT: a query may see entries low <= e < high.
      topk: how many to choose.
      chain: bf16 rounding after every step of the score (section 10, point 7).
      implementation: None chooses; "xla" or "reference" by name.

    Returns:
      int32 [B,T,min(topk, C)], ascending, -1 after the last where fewer are visible.

    Raises:
      NotImplementedError: an implementation of that name does not exist.
    """
    function = IMPLEMENTATIONS.get(implementation or "xla")
    if function is None:
        raise NotImplementedError(
            f"indexer_topk has no implementation {implementation!r}; "
            f"expected one of {sorted(IMPLEMENTATIONS)}"
        )
    topk = min(topk, keys_BCZ.shape[1])
    if topk == 0:
        return jnp.zeros((*low_BT.shape, 0), jnp.int32)
    return function(q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk, chain=chain)
