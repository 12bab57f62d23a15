"""The keys that a layer's queries meet: the one seam between attention and the cache or the mesh.

A layer's keys are its window rows and its compressed entries (in full attention every token's own
row). Those of earlier calls lie in the cache, and on a mesh other shards hold some of this call's.
`LayerState` joins them: it takes the rows that this call made, gives the keys that its queries
meet, and keeps what the next call needs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from v4jax.kernels import membership
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.sparse_attention import api as sparse_attention
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.kernels.sparse_attention.entries import expanded
from v4jax.model.buffers import as_stored, read_layer, row_axes, write_layer, write_rows
from v4jax.model.context import Context
from v4jax.sharding import collectives, sequence
from v4jax.sharding.rules import Layout

# A list of entries or index keys: an array, or as a cache stores them.
Entries = Array | CompactRows | CompactKeys


class Keys(NamedTuple):
    """What the queries of a call attend to, as `sparse_attention` takes it.

    window_BSH, first_BT, window: rows of tokens, the first row that a query may see, and of how
    many it sees the last. entries_BCH, low_BT, high_BT: compressed entries, and the range that a
    query may see. chosen_BTK or member_BTW with topk: the entries of the range that it attends to;
    neither for all of them.
    """

    window_BSH: Any = None
    first_BT: Any = None
    window: int = 0
    entries_BCH: Any = None
    low_BT: Any = None
    high_BT: Any = None
    chosen_BTK: Any = None
    member_BTW: Any = None
    topk: int = 0

    def choice(self) -> Array | None:
        """The chosen entries as indices [B,T,K], -1 for none; None where all are attended to."""
        if self.member_BTW is None:
            return self.chosen_BTK
        return membership.to_indices(self.member_BTW, self.topk, self.entries_BCH.shape[1])


@struct.dataclass
class LayerState:
    """One layer's part of the cache and of the mesh, for one call.

    Attributes:
      layout: the mesh that the call runs on.
      cache: the segment's buffers (`LayerCache`), or None.
      layer: which repeat of the segment this is.
    """

    layout: Layout = struct.field(pytree_node=False)
    cache: Any = None
    layer: Any = 0

    @property
    def in_parts(self) -> bool:
        """Whether each shard attends to its own part of the cached entries."""
        return self.cache is not None and sequence.spread_entries(self.layout)

    def extend_window(
        self, kv_BTH: Array, context: Context, window: int
    ) -> tuple[Keys, "LayerState"]:
        """This call's rows behind those of the cache, and the first that each query may see."""
        stored = None if self.cache is None else read_layer(self.cache.window, self.layer)
        older = expanded(stored)
        rows = sequence.joined_rows(self.layout, kv_BTH, older, window - 1)
        state = self
        if older is not None:
            last = self._last_rows(stored, kv_BTH, rows, context.call.total)
            state = self._keep(window=write_layer(self.cache.window, self.layer, last))
        if context.last_only:
            # The window that ends with the last real token, behind `older` and the others.
            begin = older.shape[1] + jnp.maximum(context.call.total, 1) - window
            rows = jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, window))(rows, begin)
        # A token's document begins `position` rows before it, behind the rows of earlier calls.
        queries = context.for_queries()
        earlier = rows.shape[1] - queries.tokens.shape[1]
        first = jnp.maximum(earlier + queries.row - queries.position, 0)
        return Keys(window_BSH=rows, first_BT=first, window=window), state

    def extend_tokens(self, kv_BTH: Array, context: Context) -> tuple[Keys, "LayerState"]:
        """Full attention: every token's own row is an entry, visible from itself on."""
        position, layout = context.position, self.layout
        kv = collectives.gather(kv_BTH, layout.axes("sequence"), 1)
        if self.cache is None:
            row = context.row + layout.index("sequence") * position.shape[1]
            row = jnp.broadcast_to(row, position.shape)
            return Keys(entries_BCH=kv, low_BT=row - position, high_BT=row + 1), self
        call = context.call
        tokens = self._write(self.cache.tokens, kv, call.begin, call.total)
        kv = self._read(tokens)
        high = context.for_queries().position + 1
        low, high = self.own_range(jnp.zeros_like(high), high, kv)
        return Keys(entries_BCH=kv, low_BT=low, high_BT=high), self._keep(tokens=tokens)

    def _last_rows(self, stored, kv_BTH, rows_BSH, total_B):
        """The window's rows for the next call, in the form in which it is stored.

        Rows of earlier calls move up as they are stored: a decode step packs its own row only.
        """
        few = kv_BTH.shape[1] <= stored.shape[1] and not self.layout.axes("sequence")
        if not (few and isinstance(stored, CompactRows)):
            last = sequence.last_rows(self.layout, rows_BSH, total_B, stored.shape[1])
            return as_stored(stored, last)

        def one(older, new, axis):
            joined = jnp.concatenate([older, new], axis)
            take = jax.lax.dynamic_slice_in_dim
            keep = older.shape[axis]
            return jax.vmap(lambda x, n: take(x, n, keep, axis - 1))(joined, total_B)

        return jax.tree.map(one, stored, as_stored(stored, kv_BTH), row_axes(stored, 1))

    def older_raw(self, of: str) -> Array | None:
        """A compressor's rows of earlier calls [B,P,X]; `of` is "main" or "index"."""
        if self.cache is None:
            return None
        return read_layer(getattr(self.cache, of).raw, self.layer)

    def extend_entries(
        self, of: str, new_BEX: Array, raw_BPX: Array | None, context: Context, ratio: int
    ) -> tuple[Entries, "LayerState"]:
        """The entries of all shards and earlier calls [B,C,X], and the state with the new ones.

        Entries out of a cache come in the form in which it stores them.

        Args:
          of: "main", the compressor's entries, or "index", the indexer's keys.
          new_BEX, raw_BPX: what the compressor made: new entries, and rows for the next call.
        """
        closings = context.closings(ratio)
        new = sequence.collect_entries(self.layout, new_BEX, *closings, context.row.shape[1])
        if self.cache is None:
            return new, self
        begin, total = context.call.begin, context.call.total
        first = begin // ratio
        compressor = getattr(self.cache, of)
        entries = self._write(compressor.entries, new, first, (begin + total) // ratio - first)
        raw = write_layer(compressor.raw, self.layer, raw_BPX)
        kept = self._keep(**{of: compressor.replace(entries=entries, raw=raw)})
        return self._read(entries), kept

    def own_range(self, low_BT: Array, high_BT: Array, entries_BCX: Entries) -> tuple[Array, Array]:
        """[low, high) in the numbering of the entries at hand."""
        if not self.in_parts:
            return low_BT, high_BT
        return sequence.own_range(self.layout, low_BT, high_BT, entries_BCX.shape[1])

    def own_choice(self, chosen_BTK: Array, entries_BCX: Entries) -> Array:
        """Chosen entries in the numbering of the entries at hand, -1 for those of other shards."""
        if not self.in_parts:
            return chosen_BTK
        return sequence.own_entries(self.layout, chosen_BTK, entries_BCX.shape[1])

    def attend(
        self, q_BTNH: Array, sink_N: Array, keys: Keys, scale: float, implementation: str | None
    ) -> tuple[Array, Array]:
        """The core attention [B,T,N,H] and its log-sum-exp; partial ones of shards are merged."""
        options = {"scale": scale, "implementation": implementation, "with_lse": True}
        if not (self.in_parts and keys.entries_BCH is not None):
            return sparse_attention.sparse_attention(q_BTNH, sink_N, **options, **keys._asdict())
        rows = 0 if keys.window_BSH is None else keys.window_BSH.shape[1]
        sink_N, first = sequence.first_shard_only(self.layout, sink_N, keys.first_BT, rows)
        keys = keys._replace(first_BT=first)
        o, lse = sparse_attention.sparse_attention(q_BTNH, sink_N, **options, **keys._asdict())
        return sequence.merge_attention(self.layout, o, lse), lse

    def _keep(self, **changed):
        return self.replace(cache=self.cache.replace(**changed))

    def _write(self, buffer_RBCX, new_BEX, start_B, count_B):
        """A buffer with new entries at `start`; each shard writes those of its own part."""
        first = self.layout.index("entries") * buffer_RBCX.shape[2]
        return write_rows(buffer_RBCX, self.layer, new_BEX, start_B - first, count_B)

    def _read(self, buffer_RBCX):
        """The layer's cached entries: of all shards, unless each attends to its own."""
        entries, axes = read_layer(buffer_RBCX, self.layer), self.layout.axes("entries")
        if sequence.spread_entries(self.layout):
            return entries
        return jax.tree.map(lambda x: collectives.gather(x, axes, 1), entries)
