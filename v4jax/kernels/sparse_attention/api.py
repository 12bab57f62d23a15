"""The core attention of every layer kind: a window, compressed entries, a sink, one softmax."""

import jax
from jaxtyping import Array, Float, Inexact, Int

from v4jax.kernels.sparse_attention import reference, xla

IMPLEMENTATIONS = {"xla": xla.sparse_attention, "reference": reference.sparse_attention}


def sparse_attention(
    q_BTNH: Inexact[Array, "b t n h"],
    sink_N: Float[Array, "n"],
    *,
    scale: float,
    window_BSH: Inexact[Array, "b s h"] | None = None,
    first_BT: Int[Array, "b t"] | None = None,
    window: int = 0,
    entries_BCH: Inexact[Array, "b c h"] | None = None,
    low_BT: Int[Array, "b t"] | None = None,
    high_BT: Int[Array, "b t"] | None = None,
    chosen_BTK: Int[Array, "b t k"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t n h"]:
    """Attention with one key-value head whose keys are its values (architecture section 4).

    Args:
      q_BTNH: rotated queries.
      sink_N: the logit that only enlarges each head's denominator.
      scale: factor on q.k, H^-1/2.
      window_BSH: S = P + T rows; row P + t belongs to query t, the P before are older.
      first_BT: the first row that a query may see; it sees first <= row <= P + t, and of those
        only the last `window`.
      entries_BCH: compressed entries (or, for full attention, every token's own row).
      low_BT, high_BT: a query may see entries low <= e < high.
      chosen_BTK: the entries that a query attends to, -1 where there is none; each must lie in
        [low, high). None: all of [low, high).
      implementation: None chooses; "xla" or "reference" by name.

    Returns:
      float32 [B,T,N,H]; differentiable in q, sink, window and entries.

    Raises:
      NotImplementedError: an implementation of that name does not exist.
    """
    function = IMPLEMENTATIONS.get(implementation or "xla")
    if function is None:
        raise NotImplementedError(
            f"sparse_attention has no implementation {implementation!r}; "
            f"expected one of {sorted(IMPLEMENTATIONS)}"
        )
    if entries_BCH is not None and entries_BCH.shape[1] == 0:
        entries_BCH = chosen_BTK = None
    return function(
        q_BTNH,
        sink_N,
        scale=scale,
        window_BSH=window_BSH,
        first_BT=first_BT,
        window=window,
        entries_BCH=entries_BCH,
        low_BT=low_BT,
        high_BT=high_BT,
        chosen_BTK=None if chosen_BTK is None else jax.lax.stop_gradient(chosen_BTK),
    )
