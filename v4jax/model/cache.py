"""The decode state: fixed-size buffers that go in and come out of `model.apply`.

A layer keeps the last W - 1 window rows, the compressed entries so far (and the indexer's), and
the compressor's last raw rows, enough to close a block or, with `rollback`, to open it again
(architecture section 9). Rows of a batch have lengths of their own. Buffers of a scanned segment
are stacked on a leading axis R; an unrolled layer has R = 1.

Rows of keys (window, tokens, entries) are kept in the activations' type or, where native numerics
has rounded them, as the official kernels store them: half the bytes, the same numbers. Such a
buffer is `CompactRows` or `CompactKeys`, a pytree. Its arrays have the batch on axis 1 and rows, or
blocks of rows (`lane_blocks`), on axis 2.

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
from v4jax.kernels import lane_blocks
from v4jax.kernels.sparse_attention.compact import CompactRows
from v4jax.model.buffers import (
    Activations,
    Native,
    in_blocks,
    row_axes,
    slice_start,
    write_blocks,
)
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

        def stored(x):
            return isinstance(x, CompactRows)

        buffers = jax.tree.leaves(self.layers, is_leaf=stored)
        return "native" if any(map(stored, buffers)) else "activations"

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
    def shift(rows):  # the row `count` places older moves to each place
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
    empty = Native(config, parts) if store == "native" else Activations(config, dtype, parts)
    layers = {}
    for segment in config_lib.segments(config.layers, min_repeats):
        unit = config.layers[segment.start : segment.start + segment.period]
        layers[segment.name] = tuple(
            _init_layer(empty, config, spec, (segment.repeats, batch), max_length, rollback)
            for spec in unit
        )
    # Two arrays, not one twice: a donated buffer may stand in one place only.
    lengths, spare = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    return Cache(lengths, spare, layers, max_length, rollback)


def _init_layer(empty, config, spec, lead, max_length, rollback):
    h, z = config.head_dim, config.index_head_dim
    if spec.attention == "full":
        return LayerCache(tokens=empty.rows(lead, max_length))
    window = empty.window(lead, config.sliding_window - 1 + rollback)
    if not spec.compresses:
        return LayerCache(window=window)

    def compressor(make, width):
        doubled = 2 if spec.overlap else 1
        raw = jnp.zeros((*lead, raw_rows(spec) + rollback, 2 * doubled * width), jnp.float32)
        return CompressorState(make(lead, -(-max_length // spec.ratio)), raw)

    if spec.attention == "csa":
        main, index = compressor(empty.entries, h), compressor(empty.keys, z)
        return LayerCache(window=window, main=main, index=index)
    # Read whole, and so in rows: lanes would be copied.
    return LayerCache(window=window, main=compressor(empty.rows, h))


def raw_rows(spec: LayerSpec) -> int:
    """How many earlier raw rows a new token may need to close its block."""
    return (2 if spec.overlap else 1) * spec.ratio - 1


def read_entries(buffer: Any, first: Any, count: int, row: Any = 0) -> Any:
    """Entries first .. first + count - 1 of one row of the batch, as the buffer stores them.

    Args:
      buffer: tokens or entries of a `LayerCache`.
      first, row: numbers, known or traced.

    Returns:
      Like the buffer, of one row of the batch and `count` entries.
    """

    def one(x, blocked):
        taken = lane_blocks.spanning(count, x) if blocked else count
        begin = lane_blocks.first_block(first, taken, x) if blocked else first
        shape = (x.shape[0], 1, taken, *x.shape[3:])
        found = jax.lax.dynamic_slice(x, slice_start(x, 0, row, begin), shape)
        if not blocked:
            return found
        lines = lane_blocks.as_lines(found)[:, :, None]
        return jax.lax.dynamic_slice_in_dim(lines, first - begin * x.shape[-1], count, axis=4)

    return jax.tree.map(one, buffer, in_blocks(buffer))


def write_entries(buffer: Any, row: Any, first: Any, entries: Any) -> Any:
    """The buffer with what `read_entries` gave at entry `first` of a row of the batch."""

    def one(x, new, blocked):
        if not blocked:
            return jax.lax.dynamic_update_slice(x, new, slice_start(x, 0, row, first))
        for layer in range(x.shape[0]):
            x = write_blocks(x, new[layer, 0], layer, row, jnp.int32(first), new.shape[-1])
        return x

    return jax.tree.map(one, buffer, entries, in_blocks(buffer))
