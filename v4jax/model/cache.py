"""The decode state: fixed-size buffers that go in and come out of `model.apply`.

A layer keeps the last W - 1 window rows, the compressed entries so far (and the indexer's), and
the compressor's last raw rows, enough to close a block or, with `rollback`, to open it again
(architecture section 9). Rows of a batch have lengths of their own. Buffers of a scanned segment
are stacked on a leading axis R; an unrolled layer has R = 1.

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
from v4jax.kernels.sparse_attention.entries import lanes_of
from v4jax.ops import varying
from v4jax.reprs import short_repr


@struct.dataclass
class CompressorState:
    """Entries [R,B,C,H] and the last raw rows [R,B,P,2*width]: c and gate + ape, float32.

    Entries that are fetched alone lie in lanes, [R,B,C,H/128,128] (`sparse_attention.entries`).
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
        moved = jax.vmap(lambda x, n: jnp.roll(x, n, axis=1), in_axes=(1, 0), out_axes=1)
        return moved(rows, count)

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


# One program: array by array it takes as long as the attention of a short prompt.
@functools.partial(
    jax.jit,
    static_argnames=("config", "batch", "max_length", "rollback", "dtype", "min_repeats", "parts"),
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
) -> Cache:
    """An empty cache of `batch` rows of up to `max_length` tokens.

    Args:
      rollback: how many tokens `Cache.rollback` can take back.
      dtype: type of kv rows and entries (raw compressor rows are float32).
      min_repeats: the model's, so that the cache is cut into the same segments.
      parts: how many equal parts entries can be cut into, for a mesh.

    Raises:
      InputError: a length or batch that is not positive, or beyond the model's positions.
    """
    check_sizes(config, batch, max_length, rollback)
    layers = {}
    for segment in config_lib.segments(config.layers, min_repeats):
        unit = config.layers[segment.start : segment.start + segment.period]
        layers[segment.name] = tuple(
            _init_layer(config, spec, (segment.repeats, batch), max_length, rollback, dtype, parts)
            for spec in unit
        )
    # Two arrays, not one twice: a donated buffer may stand in one place only.
    lengths, spare = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return Cache(lengths, spare, layers, max_length, rollback)


def _init_layer(config, spec, lead, max_length, rollback, dtype, parts):
    h, z = config.head_dim, config.index_head_dim
    if spec.attention == "full":
        return LayerCache(tokens=jnp.zeros((*lead, _room(max_length, parts), h), dtype))
    window = jnp.zeros((*lead, config.sliding_window - 1 + rollback, h), dtype)
    if not spec.compresses:
        return LayerCache(window=window)

    def compressor(width, entry=None):
        entries = _room(-(-max_length // spec.ratio), parts)
        doubled = 2 if spec.overlap else 1
        return CompressorState(
            entries=jnp.zeros((*lead, entries, *(entry or (width,))), dtype),
            raw=jnp.zeros((*lead, raw_rows(spec) + rollback, 2 * doubled * width), jnp.float32),
        )

    if spec.attention == "csa":
        return LayerCache(window=window, main=compressor(h, lanes_of(h)), index=compressor(z))
    return LayerCache(window=window, main=compressor(h))


def _room(entries: int, parts: int) -> int:
    """Entries to make room for: whole tiles, which the kernels then need not pad (and copy)."""
    part = -(-entries // parts)
    tile = 64 if part <= 512 else 1024
    return -(-part // tile) * tile * parts


def raw_rows(spec: LayerSpec) -> int:
    """How many earlier raw rows a new token may need to close its block."""
    return (2 if spec.overlap else 1) * spec.ratio - 1


def write_rows(buffer_RBCX, layer, rows_BKH, start_B, count_B):
    """Writes rows[b, :count[b]] at buffer[layer, b, start[b]:], in place under jit.

    One row of the batch after the other: a write that is batched over them becomes a scatter, for
    which XLA copies the whole buffer.
    """
    entry = buffer_RBCX.shape[3:]  # (H,), or H in lanes
    rows = rows_BKH.astype(buffer_RBCX.dtype).reshape(*rows_BKH.shape[:2], *entry)
    size, length = buffer_RBCX.shape[2], rows.shape[1]
    if length > size:
        rows, length = rows[:, :size], size

    def one(b, buffer):
        # The slice may not reach over the end, or it would be moved: it begins earlier instead.
        # Below 0 it begins where rows of the buffer of another shard end.
        first = jnp.clip(start_B[b], 0, size - length)
        source = jnp.arange(length, dtype=jnp.int32) + first - start_B[b]
        # One type for all of them: with JAX_ENABLE_X64 a plain 0 would be 64 bits wide.
        at = tuple(jnp.int32(i) for i in (layer, b, first, *(0 for _ in entry)))
        old = jax.lax.dynamic_slice(buffer, at, (1, 1, length, *entry))
        fresh = (source >= 0) & (source < count_B[b])
        new = rows[b, jnp.clip(source, 0, length - 1)]
        merged = jnp.where(fresh.reshape(1, 1, -1, *(1 for _ in entry)), new[None, None], old)
        return jax.lax.dynamic_update_slice(buffer, merged, at)

    if rows.shape[0] == 1:
        return one(jnp.int32(0), buffer_RBCX)
    buffer_RBCX = varying.with_axes_of(buffer_RBCX, layer, rows, start_B, count_B)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rows.shape[0]), one, buffer_RBCX)


def read_layer(buffer_RBCH, layer):
    """buffer[layer]: [B,C,H]."""
    return jax.lax.dynamic_index_in_dim(buffer_RBCH, layer, axis=0, keepdims=False)


def write_layer(buffer_RBPX, layer, rows_BPX):
    """buffer with buffer[layer] replaced (the small rows: window and raw)."""
    rows = rows_BPX.astype(buffer_RBPX.dtype)
    return jax.lax.dynamic_update_index_in_dim(buffer_RBPX, rows, layer, axis=0)
