"""Where the tokens of one call stand: positions, documents, what the cache holds already."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from v4jax.errors import InputError
from v4jax.sharding import collectives, sequence
from v4jax.sharding.rules import ONE_DEVICE, Layout


@struct.dataclass
class Context:
    """Where the tokens of one call stand, the same for every layer.

    On a mesh whose "sequence" has axes a shard holds T neighbouring rows of the whole call, else
    all of them.

    Attributes:
      tokens: ids [B,T].
      position: [B,T], within the document, for RoPE and compression blocks.
      start: [B], tokens before this shard's first; None: the row begins here.
      count: [B], real tokens in this shard's slice; the rest is right padding.
      document: [B,T], the row of the whole call at which each token's document begins; None: one
        document per row.
      call: the same of the whole call.
      aux: names of the auxiliary outputs that the caller asks for.
      dense: CSA layers attend to every visible entry instead of the indexer's choice.
      last_only: of this layer's output only each row's last real token is needed; its rows for the
        cache are made of all tokens.
    """

    tokens: Any
    position: Any
    start: Any
    count: Any
    document: Any
    call: "Call"
    aux: tuple[str, ...] = struct.field(pytree_node=False, default=())
    dense: bool = struct.field(pytree_node=False, default=False)
    layout: Layout = struct.field(pytree_node=False, default=ONE_DEVICE)
    last_only: bool = struct.field(pytree_node=False, default=False)

    def only_wanted(self, x_BTX: Array) -> Array:
        """The rows of the tokens whose output is needed: all [B,T,...], or each row's last."""
        return self.last(x_BTX) if self.last_only else x_BTX

    def last(self, x_BTX: Array) -> Array:
        """Each row's last real token of the whole call, [B,1,...], on all shards."""
        return sequence.row_of_all(self.layout, x_BTX, jnp.maximum(self.call.total - 1, 0))

    def for_queries(self) -> "Context":
        """The context of the tokens whose output is needed."""
        if not self.last_only:
            return self
        return self.replace(tokens=self.last(self.tokens), position=self.last(self.position))

    @property
    def row(self) -> Int[Array, "1 t"]:
        """Rows of this shard's slice, counted from its first."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]

    @property
    def real(self) -> Bool[Array, "b t"]:
        """Which rows are no padding."""
        return self.row < self.count[:, None]

    def visible_entries(self, ratio: int) -> tuple[Array, Array]:
        """low and high [B,T]: each query sees compressed entries low <= e < high.

        The token that closes a block sees that block (architecture section 5). In a packed row
        entries of all documents stand in one list, in the order in which their blocks close.
        """
        if self.document is None:
            high = (self.position + 1) // ratio
            return jnp.zeros_like(high), high
        closed = self.call.closed(ratio)
        before = jnp.pad(closed, ((0, 0), (1, 0)))
        high = collectives.part(closed, self.layout.axes("sequence"), 1)
        return jnp.take_along_axis(before, self.document, axis=1), high

    def closings(self, ratio: int) -> tuple[Array | None, Array | None]:
        """Where the whole call's blocks close, as `sequence.collect_entries` takes it.

        The row of the whole call at which entry i of this call closes [B,C], past the last real one
        anything; and how many entries close before each shard's slice [B,S].
        """
        layout, length = self.layout.size("sequence"), self.tokens.shape[1]
        first = length * jnp.arange(layout, dtype=jnp.int32)[None]
        if self.document is not None:
            closed = self.call.closed(ratio)
            before = jnp.where(first > 0, closed[:, first[0] - 1], 0)
            return closing_rows(closed, layout * length // ratio), before
        begin = self.call.begin
        if begin is None:
            if length % ratio == 0:
                return None, None
            entry = jnp.arange(layout * length // ratio, dtype=jnp.int32)[None]
            row, before = ratio * entry + ratio - 1, first // ratio
            batch = self.tokens.shape[0]
            return tuple(jnp.broadcast_to(x, (batch, x.shape[1])) for x in (row, before))
        entry = jnp.arange((layout * length + ratio - 1) // ratio, dtype=jnp.int32)[None]
        begin = begin[:, None]
        row = ratio * (begin // ratio + entry) + ratio - 1 - begin
        return row, (begin + first) // ratio - begin // ratio


@struct.dataclass
class Call:
    """What all shards know of the call.

    Attributes:
      begin: [B], tokens that the cache held before; None: no cache.
      total: [B], real tokens of the call.
      position, document: of all its rows; see `Context`.
    """

    begin: Any
    total: Any
    position: Any
    document: Any

    def closed(self, ratio: int) -> Int[Array, "b t"]:
        """How many compression blocks have closed at each row, itself included."""
        closes = self.position % ratio == ratio - 1
        return jnp.cumsum(closes, axis=1, dtype=jnp.int32)


def check_packed(segment_ids, cache, lengths) -> None:
    """Refuses a packed row that comes with what only other rows have."""
    if segment_ids is not None and (cache is not None or lengths is not None):
        raise InputError(
            "segment_ids came with a cache or lengths; a packed row has neither, so give each "
            "document a row of its own"
        )


def place_tokens(
    tokens_BT, lengths_B, start_B, segment_ids_BT, aux=(), dense=False, layout=ONE_DEVICE
) -> Context:
    """The context of one call from the whole of it; see `Transformer.apply`."""
    batch, length = tokens_BT.shape
    row = jnp.arange(length, dtype=jnp.int32)[None]
    total = jnp.full((batch,), length, jnp.int32) if lengths_B is None else lengths_B
    document = None
    position = jnp.broadcast_to(row, (batch, length))
    if start_B is not None:
        position = position + start_B[:, None]
    if segment_ids_BT is not None:
        document = document_starts(segment_ids_BT)
        position = row - document
    call = Call(start_B, total, position, document)
    return slice_of(tokens_BT, call, tuple(aux), dense, layout)


def slice_of(tokens_BT, call: Call, aux, dense, layout: Layout) -> Context:
    """This shard's slice of a call; all of it where "sequence" has no axes."""
    axes = layout.axes("sequence")
    tokens, position, document = (
        None if x is None else collectives.part(x, axes, 1)
        for x in (tokens_BT, call.position, call.document)
    )
    start, count = call.begin, call.total
    if axes:
        first = jax.lax.axis_index(axes) * tokens.shape[1]
        start = first + (jnp.zeros_like(count) if start is None else start)
        count = jnp.clip(count - first, 0, tokens.shape[1])
    return Context(tokens, position, start, count, document, call, aux, dense, layout)


def closing_rows(closed_BT: Int[Array, "b t"], entries: int) -> Int[Array, "b c"]:
    """The row at which each of the first `entries` blocks closes; the last row past the last."""
    batch, length = closed_BT.shape
    before = jnp.pad(closed_BT, ((0, 0), (1, 0)))[:, :-1]
    # Written, not searched for: XLA would repeat a search inside whatever reads its result.
    place = jnp.where(closed_BT > before, closed_BT - 1, entries)
    rows = jnp.full((batch, entries), length - 1, jnp.int32)
    row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    return rows.at[jnp.arange(batch, dtype=jnp.int32)[:, None], place].set(row, mode="drop")


def document_starts(segment_ids_BT: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The row at which each token's run of equal segment ids begins."""
    row = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), mode="edge")[:, :-1]
    starts = jnp.where(segment_ids_BT != before, row, 0)
    return jnp.maximum.accumulate(starts, axis=1)
