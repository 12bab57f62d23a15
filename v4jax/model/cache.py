"""The decode state: fixed-size buffers that go in and come out of `model.apply`.

A layer keeps the last W - 1 window rows, the compressed entries so far (and the indexer's), and
the compressor's last raw rows, enough to close a block or, with `rollback`, to open it again
(architecture section 9). Rows of a batch have lengths of their own. Buffers of a scanned segment
are stacked on a leading axis R; an unrolled layer has R = 1.

Rows of keys (window, tokens, entries) are kept in the activations' type or, where native numerics
has rounded them, as the official kernels store them: half the bytes, the same numbers. Such a
buffer is `CompactRows` or `CompactKeys`, a pytree whose arrays have the batch on axis 1 and each
its rows on an axis of its own (`row_axes`).

Fields of these pytrees are annotated Any: jax also builds them with shapes, specs and None inside.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from v4jax import config as config_lib
from v4jax.config import LayerSpec, ModelConfig
from v4jax.errors import InputError
from v4jax.kernels.indexer_topk import compact_keys
from v4jax.kernels.indexer_topk.compact_keys import CompactKeys
from v4jax.kernels.sparse_attention import compact
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.kernels.sparse_attention.entries import lanes_of
from v4jax.ops import varying
from v4jax.reprs import short_repr

STORES = ("native", "activations")


@struct.dataclass
class CompressorState:
    """Entries [R,B,C,H] and the last raw rows [R,B,P,2*width]: c and gate + ape, float32.

    Entries that are fetched alone lie in lanes, [R,B,C,H/128,128] (`sparse_attention.entries`). As
    stored they are `CompactRows`, the indexer's `CompactKeys`.
    """

    entries: Any
    raw: Any

    def __repr__(self) -> str:
        return short_repr(self)


@struct.dataclass
class LayerCache:
    """What one layer (R repeats of it) remembers; None where its kind has none.

    window: [R,B,W-1+rollback,H], the newest row last. tokens: every token's row [R,B,max_length,H]
    of a full-attention layer. main, index: the two compressors' states.
    """

    window: Any = None
    tokens: Any = None
    main: Any = None
    index: Any = None

    def __repr__(self) -> str:
        return short_repr(self)


@struct.dataclass
class Cache:
    """A batch's decode state.

    lengths [B]: tokens seen. spare [B]: how many of them can still be rolled back. layers: for
    every segment of the model a tuple of `LayerCache`, one a block of its unit.
    """

    lengths: Any
    spare: Any
    layers: Any
    max_length: int = struct.field(pytree_node=False)
    max_rollback: int = struct.field(pytree_node=False)

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def store(self) -> str:
        """How rows of keys are kept, one of STORES."""
        for layer in (layer for blocks in self.layers.values() for layer in blocks):
            rows = layer.tokens if layer.window is None else layer.window
            return "native" if isinstance(rows, CompactRows) else "activations"
        return "activations"

    def rollback(self, count: ArrayLike) -> "Cache":
        """The cache as it was `count` tokens ago, a number for the batch or one for each row, [B].

        Raises:
          InputError: more than `rollback` of `init_cache`, or than the row holds (checked when
            the numbers are concrete).
        """
        count = jnp.asarray(count)
        if not jnp.issubdtype(count.dtype, jnp.integer) or count.shape not in (
            (),
            self.lengths.shape,
        ):
            raise InputError(
                f"rollback got {count.dtype}{list(count.shape)}; expected whole numbers, one or "
                f"{list(self.lengths.shape)} for the rows"
            )
        count = jnp.broadcast_to(count.astype(jnp.int32), self.lengths.shape)
        wrong = jnp.any((count > self.spare) | (count < 0))
        if not isinstance(wrong, jax.core.Tracer) and bool(wrong):
            raise InputError(
                f"rollback by {count.tolist()} tokens and the rows can go back "
                f"{self.spare.tolist()}; make the cache with init_cache(..., rollback=N)"
            )
        return _roll_back(self, count)


def _roll_back(cache, count):
    def shift(rows):  # [R,B,P,...]: the row `count` places older moves to each place
        def one(x, axis):
            moved = jax.vmap(lambda x, n: jnp.roll(x, n, axis - 1), in_axes=(1, 0), out_axes=1)
            return moved(x, count)

        return jax.tree.map(one, rows, row_axes(rows))

    def layer(state):
        def raw(compressor):
            return compressor and compressor.replace(raw=shift(compressor.raw))

        window = None if state.window is None else shift(state.window)
        return state.replace(window=window, main=raw(state.main), index=raw(state.index))

    layers = {name: tuple(map(layer, blocks)) for name, blocks in cache.layers.items()}
    return cache.replace(lengths=cache.lengths - count, spare=cache.spare - count, layers=layers)


def check_sizes(config: ModelConfig, batch: int, max_length: int, rollback: int) -> None:
    """Refuses sizes of a cache that no call could use.

    Raises:
      InputError: no whole number, a batch or length that is not positive, a negative rollback, or
        a length beyond the model's positions.
    """
    for name, value, least in (
        ("batch", batch, 1),
        ("max_length", max_length, 1),
        ("rollback", rollback, 0),
    ):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < least:
            raise InputError(f"cache {name} is {value}; expected {least} or more, a whole number")
    if max_length > config.max_position_embeddings:
        raise InputError(
            f"cache max_length is {max_length}, beyond the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )


def check_store(store: str, native: bool) -> None:
    """Refuses a store that is unknown or would round what the numerics does not.

    Raises:
      InputError: naming what was expected.
    """
    if store not in STORES:
        raise InputError(f"cache store is {store!r}; expected one of {STORES}")
    if store == "native" and not native:
        raise InputError(
            "cache store is 'native' and the model's numerics are not, so that its rows would be "
            "rounded on the way into the cache; make the model with numerics='native', or the "
            "cache with init_cache(..., store='activations')"
        )


# One program: array by array it takes as long as the attention of a short prompt.
@functools.partial(
    jax.jit,
    static_argnames=(
        "config",
        "batch",
        "max_length",
        "rollback",
        "dtype",
        "min_repeats",
        "parts",
        "store",
    ),
)
def init_cache(
    config: ModelConfig,
    batch: int,
    max_length: int,
    *,
    rollback: int = 0,
    dtype="float32",
    min_repeats: int = 4,
    parts: int = 1,
    store: str = "activations",
) -> Cache:
    """An empty cache of `batch` rows of up to `max_length` tokens.

    Args:
      rollback: how many tokens `Cache.rollback` can take back.
      dtype: type of kv rows and entries (raw compressor rows are float32).
      min_repeats: the model's, so that the cache is cut into the same segments.
      parts: how many equal parts entries can be cut into, for a mesh.
      store: "activations" keeps kv rows, entries and index keys in `dtype`; "native" as E4M3 groups
        with bf16 rope channels and as E2M1, to which native numerics has rounded them.

    Raises:
      InputError: a length or batch that is not positive, or beyond the model's positions.
    """
    check_sizes(config, batch, max_length, rollback)
    empty = _Native(config) if store == "native" else _Activations(config, dtype)
    layers = {}
    for segment in config_lib.segments(config.layers, min_repeats):
        unit = config.layers[segment.start : segment.start + segment.period]
        layers[segment.name] = tuple(
            _init_layer(empty, config, spec, (segment.repeats, batch), max_length, rollback, parts)
            for spec in unit
        )
    # Two arrays, not one twice: a donated buffer may stand in one place only.
    lengths, spare = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return Cache(lengths, spare, layers, max_length, rollback)


class _Activations:
    """Empty buffers in the activations' type."""

    def __init__(self, config, dtype):
        self._width, self._index_width = config.head_dim, config.index_head_dim
        self._dtype = dtype

    def rows(self, lead, count):
        return jnp.zeros((*lead, count, self._width), self._dtype)

    def entries(self, lead, count):
        return jnp.zeros((*lead, count, *lanes_of(self._width)), self._dtype)

    def keys(self, lead, count):
        return jnp.zeros((*lead, count, self._index_width), self._dtype)


class _Native:
    """Empty buffers in stored form."""

    def __init__(self, config):
        self._width, self._rope = config.head_dim, config.qk_rope_head_dim
        self._index_width = config.index_head_dim

    def rows(self, lead, count):
        return compact.empty(lead, count, self._width, self._rope)

    entries = rows

    def keys(self, lead, count):
        return compact_keys.empty(lead, count, self._index_width)


def _init_layer(empty, config, spec, lead, max_length, rollback, parts):
    h, z = config.head_dim, config.index_head_dim
    if spec.attention == "full":
        return LayerCache(tokens=empty.rows(lead, _room(max_length, parts)))
    window = empty.rows(lead, config.sliding_window - 1 + rollback)
    if not spec.compresses:
        return LayerCache(window=window)

    def compressor(make, width):
        entries = _room(-(-max_length // spec.ratio), parts)
        doubled = 2 if spec.overlap else 1
        raw = jnp.zeros((*lead, raw_rows(spec) + rollback, 2 * doubled * width), jnp.float32)
        return CompressorState(make(lead, entries), raw)

    if spec.attention == "csa":
        main, index = compressor(empty.entries, h), compressor(empty.keys, z)
        return LayerCache(window=window, main=main, index=index)
    # Read whole, and so in rows: lanes would be copied.
    return LayerCache(window=window, main=compressor(empty.rows, h))


def _room(entries: int, parts: int) -> int:
    """Entries to make room for: whole tiles, which the kernels then need not pad (and copy)."""
    part = -(-entries // parts)
    tile = 64 if part <= 512 else 1024
    return -(-part // tile) * tile * parts


def raw_rows(spec: LayerSpec) -> int:
    """How many earlier raw rows a new token may need to close its block."""
    return (2 if spec.overlap else 1) * spec.ratio - 1


def row_axes(buffer: Any, leading: int = 2) -> Any:
    """The axis along which each of a buffer's arrays has its rows; leading: axes before them."""
    if isinstance(buffer, CompactRows | CompactKeys):
        return buffer.entry_axes(leading)
    return leading


def as_stored(buffer: Any, rows: jax.Array) -> Any:
    """Rows [...,K,H] in the form of a buffer."""
    if isinstance(buffer, CompactRows):
        return compact.pack(rows, buffer.rope)
    if isinstance(buffer, CompactKeys):
        return compact_keys.pack(rows)
    return rows.astype(buffer.dtype)


def write_rows(buffer: Any, layer, rows_BKH, start_B, count_B) -> Any:
    """Writes rows[b, :count[b]] at buffer[layer, b, start[b]:], in place under jit.

    One row of the batch after the other: a write that is batched over them becomes a scatter, for
    which XLA copies the whole buffer.
    """
    rows, size = as_stored(buffer, rows_BKH), buffer.shape[2]
    length = min(rows_BKH.shape[1], size)

    def one(b, buffer):
        # The slice may not reach over the end, or it would be moved: it begins earlier instead.
        # Below 0 it begins where rows of the buffer of another shard end.
        first = jnp.clip(start_B[b], 0, size - length)
        source = jnp.arange(length, dtype=jnp.int32) + first - start_B[b]
        fresh = (source >= 0) & (source < count_B[b])

        def array(x, rows, axis):
            new = jnp.take(rows[b], source, axis - 2, mode="clip")
            new = new.reshape(_cut(x.shape, axis, length))
            at = _start(x, layer, b, axis, first)
            old = jax.lax.dynamic_slice(x, at, new.shape)
            mask = fresh.reshape(_along(x.ndim, axis))
            return jax.lax.dynamic_update_slice(x, jnp.where(mask, new, old), at)

        return jax.tree.map(array, buffer, rows, row_axes(buffer))

    if rows_BKH.shape[0] == 1:
        return one(jnp.int32(0), buffer)
    buffer = varying.with_axes_of(buffer, layer, rows, start_B, count_B)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rows_BKH.shape[0]), one, buffer)


def _start(x, layer, row, axis, first):
    """Where a slice of an array [R,B,...] begins, in one type: with x64 a 0 would be wider."""
    at = {0: layer, 1: row, axis: first}
    return tuple(jnp.int32(at.get(i, 0)) for i in range(x.ndim))


def _cut(shape, axis, count):
    """The shape of `count` rows of one row of the batch in one layer."""
    return (1, 1, *(count if i == axis else n for i, n in enumerate(shape) if i > 1))


def _along(ndim, axis):
    """The shape of a vector along one axis of so many."""
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def read_entries(buffer: Any, first: Any, count: int, row: Any = 0) -> Any:
    """Entries first .. first + count - 1 of one row of the batch, as the buffer stores them.

    Args:
      buffer: tokens or entries of a `LayerCache`.
      first, row: numbers, known or traced.

    Returns:
      Like the buffer, [R,1,count,...] instead of [R,B,C,...].
    """

    def one(x, axis):
        shape = (x.shape[0], *_cut(x.shape, axis, count)[1:])
        return jax.lax.dynamic_slice(x, _start(x, 0, row, axis, first), shape)

    return jax.tree.map(one, buffer, row_axes(buffer))


def write_entries(buffer: Any, row: Any, first: Any, entries: Any) -> Any:
    """The buffer with what `read_entries` gave at entry `first` of a row of the batch."""

    def one(x, new, axis):
        return jax.lax.dynamic_update_slice(x, new, _start(x, 0, row, axis, first))

    return jax.tree.map(one, buffer, entries, row_axes(buffer))


def read_layer(buffer: Any, layer) -> Any:
    """buffer[layer]: [B,C,H]."""
    take = jax.lax.dynamic_index_in_dim
    return jax.tree.map(lambda x: take(x, layer, axis=0, keepdims=False), buffer)


def write_layer(buffer: Any, layer, rows: Any) -> Any:
    """buffer with buffer[layer] replaced (the small rows: window and raw)."""

    def one(x, rows):
        return jax.lax.dynamic_update_index_in_dim(x, rows.astype(x.dtype), layer, axis=0)

    return jax.tree.map(one, buffer, rows)
