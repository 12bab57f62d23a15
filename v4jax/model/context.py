"""Where the tokens of one call stand: positions, documents, what the cache holds already."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

AUX_NAMES = (
    "streams",
    "router_experts",
    "router_weights",
    "router_scores",
    "chosen",
    "index_scores",
    "mhc",
    "attention",
    "router_load",
    "indexer_loss",
)


@struct.dataclass
class Context:
    """The places of one call's tokens, the same for every layer.

    tokens [B,T]. position [B,T]: within the document, for RoPE and compression blocks.
    start [B]: tokens that the cache held before (None: no cache). count [B]: real tokens in the
    call (the rest is right padding). document [B,T]: the row at which each token's document
    begins (None: one document a row). aux: names of wanted auxiliary outputs. dense: CSA layers
    attend to every visible entry instead of the indexer's choice.
    """

    tokens: Any
    position: Any
    start: Any
    count: Any
    document: Any
    aux: tuple[str, ...] = struct.field(pytree_node=False, default=())
    dense: bool = struct.field(pytree_node=False, default=False)

    def visible_entries(self, ratio: int) -> tuple[Array, Array]:
        """low and high [B,T]: each query sees compressed entries low <= e < high.

        The token that closes a block sees that block (architecture section 5). In a packed row
        entries of all documents stand in one list, in the order in which their blocks close.
        """
        if self.document is None:
            high = (self.position + 1) // ratio
            return jnp.zeros_like(high), high
        closed = jnp.cumsum(self.closes(ratio), axis=1, dtype=jnp.int32)
        before = jnp.pad(closed, ((0, 0), (1, 0)))
        return jnp.take_along_axis(before, self.document, axis=1), closed

    def closes(self, ratio: int) -> Bool[Array, "b t"]:
        """Whether a token is the last of its compression block."""
        return self.position % ratio == ratio - 1


def place_tokens(tokens_BT, lengths_B, start_B, segment_ids_BT, aux=(), dense=False) -> Context:
    """The context of one call; see `Transformer.__call__` for the arguments."""
    batch, length = tokens_BT.shape
    row = jnp.arange(length, dtype=jnp.int32)[None]
    count = jnp.full((batch,), length, jnp.int32) if lengths_B is None else lengths_B
    document = None
    position = jnp.broadcast_to(row, (batch, length))
    if start_B is not None:
        position = position + start_B[:, None]
    if segment_ids_BT is not None:
        document = document_starts(segment_ids_BT)
        position = row - document
    return Context(tokens_BT, position, start_B, count, document, tuple(aux), dense)


def document_starts(segment_ids_BT: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The row at which each token's run of equal segment ids begins."""
    row = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), mode="edge")[:, :-1]
    starts = jnp.where(segment_ids_BT != before, row, 0)
    return jnp.maximum.accumulate(starts, axis=1)
